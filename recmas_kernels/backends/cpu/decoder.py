"""The kernels of decoder layers, which work on one position of few rows: what precedes attention and the rest, or all.

Arguments of weights and norms come flat, as ``csrc/python/layer_arguments.h`` reads them: a weight is ``(panels, number
of the stored dtype, bias or None)``, a norm ``(gain or None, offset, eps)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels.backends.cpu.module import DEVICE, DTYPES, isa_in_use, kernels

MOST_ROWS = 16  # csrc/link.h, most_layer_rows
NO_NORM = (None, 0.0, 0.0)
ACTIVATIONS = ("silu", "gelu_erf", "gelu_tanh")  # csrc/link.h, enum Activation


def dtype_number(dtype: torch.dtype) -> int:
    """As the kernels number dtypes."""
    return DTYPES[dtype]


def layer_inputs(
    sizes: tuple[int, int, int], scale: float, x: Tensor, arguments: tuple[Any, ...], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, heads, D]`` float32, scaled; keys and values ``[B, key heads, 1, D]`` in x's dtype.

    Args:
        sizes: heads, key heads, D.
        scale: of queries.
        x: ``[B, 1, d]``, B at most `MOST_ROWS`.
        arguments: norm, three weights, norms of queries and of keys.
        cos, sin: ``[B or 1, 1, D]``.
    """
    heads, key_heads, features = sizes
    queries = torch.empty(x.shape[0], heads, features, dtype=torch.float32, device=DEVICE)
    keys = torch.empty(x.shape[0], key_heads, 1, features, dtype=x.dtype, device=DEVICE)
    values = torch.empty_like(keys)
    run, settings = kernels().layer_inputs, (isa_in_use(), torch.get_num_threads(), *sizes, scale)
    if not run(*settings, x, *arguments, cos, sin, queries, keys, values):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        if not run(*settings, x, *arguments, cos, sin, queries, keys, values):
            raise AssertionError("contiguous rows are readable")
    return queries, keys, values


def layer_output(
    sizes: tuple[int, int, int, int, int],
    x: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    arguments: tuple[Any, ...],
) -> Tensor:
    """The layer's result ``[B, 1, d]`` in x's dtype.

    Args:
        sizes: heads, key heads, D, hidden features, number of the activation.
        x: as for `layer_inputs`.
        queries: from there.
        keys, values: ``[B, key heads, T, D]`` of all positions, any strides.
        mask: bool ``[B or 1, 1, 1, T]``, True where a position is attended; None: everywhere.
        arguments: of the weight after attention, the norms after it and before the feed-forward part, that part's
            three weights, the norm after it.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    run, settings = kernels().layer_output, (isa_in_use(), torch.get_num_threads(), *sizes)
    if not run(*settings, x, queries, keys, values, mask, *arguments, y):
        keys, values = keys.to(x.dtype).contiguous(), values.to(x.dtype).contiguous()
        mask = None if mask is None else mask.contiguous()
        if not run(*settings, x.contiguous(), queries, keys, values, mask, *arguments, y):
            raise AssertionError("contiguous tensors are readable")
    return y


class DecoderLayers:
    """Decoder layers one after the other, read once for many calls. Gains and biases are read at each of them.

    Args:
        x: ``[B, 1, d]``, as for `layer_inputs`; calls take such rows.
        layers: of each, sizes as for `layer_output`, the scale, the arguments of `layer_inputs`, the number of what it
            is given, keys, values ``[B, key heads, T, D]``, and the arguments of `layer_output`. Tensors among them,
            but for gains and biases, must keep their memory.
    """

    def __init__(self, x: Tensor, layers: Iterable[tuple[Any, ...]]) -> None:
        found = tuple(layers)
        self.count = len(found)
        self._queries = x.shape[0] * max(heads * features for heads, _, features, *_ in found)
        self._read = kernels().read_decoder_layers(isa_in_use(), x.shape[0], x.shape[2], found)

    def __call__(
        self, x: Tensor, y: Tensor, given: tuple[Any, ...], positions: int = -1, norm: tuple[Any, ...] = NO_NORM
    ) -> bool:
        """The layers, into ``y``; False, and nothing done, if the kernels cannot read one of the tensors.

        Args:
            x: rows like those that the layers were read for.
            y: the same.
            given: cos, sin, mask as above, in a row for each number that a layer names.
            positions: that keys and values hold with the last one, which is written; -1 is as many as they have.
            norm: of what the last layer returns, in the place of that.
        """
        queries = torch.empty(self._queries, dtype=torch.float32, device=DEVICE)
        settings = isa_in_use(), torch.get_num_threads()
        x = x.contiguous()
        return bool(kernels().decoder_layers(*settings, x, y, queries, given, positions, *norm, self._read))
