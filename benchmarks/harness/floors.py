"""Least work of every benchmarked op: floating-point operations, bytes to and from memory, and the time they need.

Operations count a multiply and an add as two, as `torch.utils.flop_counter` does, and only matrix products: the
pointwise part is a few per cent at most. Bytes are what no implementation can avoid: each input read once and each
output written once per pass, in the dtype it has outside the op. Nothing here measures anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from recmas_kernels import LinkConfig


@dataclass(frozen=True)
class Work:
    """What one call cannot avoid.

    Attributes:
        flops: floating-point operations in matrix products.
        bytes_min: bytes moved.
        weight_bytes: those of ``bytes_min`` that are weights (or gradients of weights).
    """

    flops: int
    bytes_min: int
    weight_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes_min + other.bytes_min, self.weight_bytes + other.weight_bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.bytes_min * times, self.weight_bytes * times)


@dataclass(frozen=True)
class Floor:
    """Least time of some work on a machine.

    Attributes:
        seconds: the larger of the time of the operations and the time of the bytes.
        bound: "compute", "weights" (bytes, most of them weights) or "memory" (bytes, most of them rows).
    """

    seconds: float
    bound: str


def floor(work: Work, flops_per_second: float, bytes_per_second: float) -> Floor:
    """The least time of ``work`` at the given rates."""
    compute, memory = work.flops / flops_per_second, work.bytes_min / bytes_per_second
    if compute >= memory:
        return Floor(compute, "compute")
    return Floor(memory, "weights" if 2 * work.weight_bytes >= work.bytes_min else "memory")


def link_parameters(config: LinkConfig) -> int:
    """Number of elements of a two-layer link's parameters."""
    in_features, hidden, out = config.in_features, config.hidden_features, config.out_features
    linear = config.residual == "linear"
    count = hidden * in_features + out * hidden + (out * in_features if linear else 0)
    if config.bias:
        count += hidden + out + (out if linear else 0)
    return count + (2 * in_features + 2 * out if config.norm else 0)


def link_products(config: LinkConfig) -> int:
    """Multiply-adds per token of a two-layer link."""
    in_features, hidden, out = config.in_features, config.hidden_features, config.out_features
    return hidden * in_features + out * hidden + (out * in_features if config.residual == "linear" else 0)


def link_forward(config: LinkConfig, tokens: int, itemsize: int) -> Work:
    """A link's forward without grad: weights and x read, y written."""
    weights = link_parameters(config) * itemsize
    rows = tokens * (config.in_features + config.out_features) * itemsize
    return Work(2 * tokens * link_products(config), weights + rows, weights)


def link_backward(config: LinkConfig, tokens: int, itemsize: int) -> Work:
    """A link's backward with every gradient, after a forward that kept the pre-activation.

    Reads the weights, x, dy and the pre-activation, writes dx and one gradient per parameter; its products are twice
    the forward's.
    """
    forward = link_forward(config, tokens, itemsize)
    weights, kept = forward.weight_bytes, tokens * config.hidden_features * itemsize
    rows = tokens * (2 * config.in_features + config.out_features) * itemsize
    return Work(2 * forward.flops, 2 * weights + kept + rows, 2 * weights)


def link_training(config: LinkConfig, tokens: int, itemsize: int) -> Work:
    """A link's forward and backward with every gradient, in two passes; the forward also writes the pre-activation."""
    kept = tokens * config.hidden_features * itemsize
    return link_forward(config, tokens, itemsize) + link_backward(config, tokens, itemsize) + Work(0, kept)


def product(rows: int, depth: int, columns: int, itemsize: int) -> Work:
    """A matrix product ``[rows, depth] [depth, columns]``: both operands read, the result written."""
    weights = depth * columns * itemsize
    return Work(2 * rows * depth * columns, weights + rows * (depth + columns) * itemsize, weights)


def alignment_training(tokens: int, features: int, itemsize: int) -> Work:
    """The alignment loss with its gradient: predictions and target rows read, gradient written; no products."""
    return Work(0, 3 * tokens * features * itemsize)


def vocabulary_step(tokens: int, features: int, vocabulary: int, itemsize: int) -> Work:
    """One step of a text handoff: LM head over ``tokens`` rows, the choice, and the chosen rows embedded again."""
    table = vocabulary * features * itemsize
    rows = 3 * tokens * features * itemsize  # hidden states read, table rows read, embeddings written
    return Work(2 * tokens * vocabulary * features, table + rows, table)


def body_backward(parameters: int, layers: int, features: int, fed: range, batch: int) -> Work:
    """Gradients of a frozen body's inputs: the weights' products once more, those of attention twice."""
    attention = 8 * layers * features * sum(position + 1 for position in fed)
    read = 4 * parameters
    return Work(batch * (2 * parameters * len(fed) + attention), read, read)


def body_pass(
    parameters: int, layers: int, features: int, fed: range, batch: int, passes: int, element: int = 4
) -> Work:
    """A decoder's body run over the positions ``fed`` on a cache of those before, in so many passes.

    Each position is multiplied by every weight, of ``element`` bytes, and attends to itself and all before; each
    pass reads the weights.
    """
    attention = 4 * layers * features * sum(position + 1 for position in fed)  # queries by keys, weights by values
    read = passes * element * parameters
    return Work(batch * (2 * parameters * len(fed) + attention), read, read)
