"""The correctness gate: no cell is timed before its results stand against float64.

The oracle and the budget are those of the kernel tests; what peers err by is recorded, not judged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.baselines import Forward, LinkPeer
from benchmarks.record import FUSED
from recmas_kernels import FusedRecursiveLink
from tests.kernels.helpers import (
    check_budget,
    check_link,
    eager_twin,
    make_rows,
    poisoned_allocations,
    relative_error,
    run,
)

GATE_ROWS = 64


def inference_errors(link: FusedRecursiveLink, tokens: int, peers: Mapping[str, LinkPeer]) -> dict[str, float]:
    """Relative error of every forward on ``tokens`` rows; the fused one is within the budget and repeats its bits.

    Few tokens are drawn several times: a maximum over a handful of values says little about either side.
    """
    dtype = link.proj1.weight.dtype
    batches = make_rows(max(1, GATE_ROWS // tokens), tokens, link.config.in_features, dtype=dtype)

    def outputs(forward: Forward) -> Tensor:
        return torch.cat([forward(x) for x in batches])

    with torch.no_grad():
        truth = eager_twin(link, torch.float64)(batches.flatten(0, 1).double())
        eager = outputs(eager_twin(link, dtype))
        with poisoned_allocations():
            link(batches[0])  # weights are packed at their second sighting
            first, second = outputs(link), outputs(link)
        check_budget("y", first, eager, truth, dtype)
        assert torch.equal(first, second), "two equal calls gave different bits"
        errors = {name: relative_error(outputs(peer.forward), truth) for name, peer in peers.items()}
    return {FUSED: relative_error(first, truth), **errors}


def training_errors(link: FusedRecursiveLink, x: Tensor, dy: Tensor, peers: Mapping[str, LinkPeer]) -> dict[str, float]:
    """Largest relative error among the output and all gradients; the fused ones are within the budget and repeat."""
    with poisoned_allocations():
        results = check_link(link, x, dy)
    again = run(link, x, dy)
    for name, grad in results.grads.items():
        assert torch.equal(grad, again.grads[name]), f"gradient of {name}: two equal calls gave different bits"
    truth = run(eager_twin(link, torch.float64), x.double(), dy.double())
    errors = {FUSED: [relative_error(results.y, truth.y)]}
    errors[FUSED] += [relative_error(results.grads[name], grad) for name, grad in truth.grads.items()]
    for name, peer in peers.items():
        y, grads = step(peer, x.detach().requires_grad_(), dy)
        errors[name] = [relative_error(y, truth.y)]
        errors[name] += [relative_error(grad, exact) for grad, exact in zip(grads, truth.grads.values(), strict=True)]
    return {name: max(values) for name, values in errors.items()}


def step(peer: LinkPeer, x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward of a peer: ``(y, gradients of x and of the parameters in their order)``."""
    y = peer.forward(x)
    return y.detach(), torch.autograd.grad(y, (x, *peer.module.parameters()), dy)
