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
from recmas_kernels.testing import (
    check_budget,
    eager_twin,
    make_rows,
    poisoned_allocations,
    relative_error,
)

GATE_ROWS = 64


def inference_errors(link: FusedRecursiveLink, tokens: int, peers: Mapping[str, LinkPeer]) -> dict[str, float]:
    """Relative error of every forward on ``tokens`` rows; the fused one is within the budget and repeats its bits."""
    dtype, device = link.proj1.weight.dtype, link.proj1.weight.device
    batches = make_rows(_draws(tokens), tokens, link.config.in_features, dtype=dtype).to(device)

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


def training_errors(link: FusedRecursiveLink, tokens: int, peers: Mapping[str, LinkPeer]) -> dict[str, float]:
    """Largest relative error among the output and all gradients; the fused ones are within the budget and repeat."""
    dtype, device, draws = link.proj1.weight.dtype, link.proj1.weight.device, _draws(tokens)
    xs = make_rows(draws, tokens, link.config.in_features, dtype=dtype).to(device)
    dys = make_rows(draws, tokens, link.config.out_features, dtype=dtype, seed=2).to(device)

    def results(peer: LinkPeer, wanted: torch.dtype = dtype) -> dict[str, Tensor]:
        steps = [step(peer, x.to(wanted).requires_grad_(), dy.to(wanted)) for x, dy in zip(xs, dys, strict=True)]
        return {name: torch.stack([values[name] for values in steps]) for name in steps[0]}

    exact, plain = eager_twin(link, torch.float64), eager_twin(link, dtype)
    truth, eager = results(LinkPeer(exact, exact), torch.float64), results(LinkPeer(plain, plain))
    with poisoned_allocations():
        fused, again = results(LinkPeer(link, link)), results(LinkPeer(link, link))
    for name, true_values in truth.items():
        check_budget(name, fused[name], eager[name], true_values, dtype)
        assert torch.equal(fused[name], again[name]), f"{name}: two equal calls gave different bits"
    errors = {FUSED: fused} | {name: results(peer) for name, peer in peers.items()}
    return {name: max(relative_error(values[key], truth[key]) for key in truth) for name, values in errors.items()}


def step(peer: LinkPeer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward and backward of a peer: ``y`` and the gradients of ``x`` and of every parameter, by name."""
    y = peer.forward(x)
    names, parameters = zip(*peer.module.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy)
    return {"y": y.detach(), **dict(zip(("x", *names), grads, strict=True))}


def _draws(tokens: int) -> int:
    """How often ``tokens`` rows are drawn: a maximum over a handful of values says little about either side."""
    return max(1, GATE_ROWS // tokens)
