"""The correctness gate: no cell is timed before its results are compared with float64.

The oracle and the budget are those of the kernel tests. What peers err by is recorded, not judged, so a slow peer is
compared on fewer draws; what is under test is compared on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.harness.link_peer import LinkPeer, step
from benchmarks.harness.names import FUSED
from benchmarks.harness.time_bound import TimeBound
from benchmarks.harness.wide_products import WideProducts
from recmas_kernels import FusedRecursiveLink
from recmas_kernels.testing import (
    check_budget,
    eager_twin,
    make_rows,
    poisoned_allocations,
    relative_error,
)

GATE_ROWS = 64
Result = TypeVar("Result")


def inference_errors(
    link: FusedRecursiveLink,
    tokens: int,
    peers: Mapping[str, LinkPeer],
    *,
    slow_eager: bool = False,
    bound: TimeBound = TimeBound(),  # noqa: B008
) -> dict[str, float]:
    """Relative error of every forward on ``tokens`` rows; the fused one is within the budget and repeats its bits.

    Args:
        link: what is under test.
        tokens: rows per call.
        peers: other implementations, by name.
        slow_eager: the budget comes from eager torch with `WideProducts` instead of its own.
        bound: the time in which each peer runs as many draws as it can, at least one.
    """
    dtype, device = link.proj1.weight.dtype, link.proj1.weight.device
    batches = make_rows(_draws(tokens), tokens, link.config.in_features, dtype=dtype).to(device)

    def outputs(peer: LinkPeer, bound: TimeBound | None = None) -> Tensor:
        return torch.cat(_runs(lambda x: peer.forward(x.to(peer.dtype)), batches, bound=bound))

    exact, plain = eager_twin(link, torch.float64), eager_twin(link, dtype)
    with torch.no_grad():
        truth = outputs(LinkPeer(exact, exact))
        with WideProducts() if slow_eager else nullcontext():
            eager = outputs(LinkPeer(plain, plain))
        with poisoned_allocations():
            link(batches[0])  # the second call may pack weights
            first, second = outputs(LinkPeer(link, link)), outputs(LinkPeer(link, link))
        check_budget("y", first, eager, truth, dtype)
        assert torch.equal(first, second), "two equal calls gave different bits"
        errors = {FUSED: relative_error(first, truth)}
        for name, peer in peers.items():
            found = outputs(peer, bound)
            errors[name] = relative_error(found, truth[: len(found)])
    return errors


def training_errors(
    link: FusedRecursiveLink,
    tokens: int,
    peers: Mapping[str, LinkPeer],
    *,
    slow_eager: bool = False,
    bound: TimeBound = TimeBound(),  # noqa: B008
) -> dict[str, float]:
    """Largest relative error among the output and all gradients; the fused ones are within the budget and repeat.

    Arguments as in `inference_errors`.
    """
    dtype, device, draws = link.proj1.weight.dtype, link.proj1.weight.device, _draws(tokens)
    xs = make_rows(draws, tokens, link.config.in_features, dtype=dtype).to(device)
    dys = make_rows(draws, tokens, link.config.out_features, dtype=dtype, seed=2).to(device)

    def results(peer: LinkPeer, bound: TimeBound | None = None) -> dict[str, Tensor]:
        def run(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
            return step(peer, x.to(peer.dtype).requires_grad_(), dy.to(peer.dtype))

        steps = _runs(run, xs, dys, bound=bound)
        return {name: torch.stack([values[name] for values in steps]) for name in steps[0]}

    exact, plain = eager_twin(link, torch.float64), eager_twin(link, dtype)
    truth = results(LinkPeer(exact, exact))
    with WideProducts() if slow_eager else nullcontext():
        eager = results(LinkPeer(plain, plain))
    with poisoned_allocations():
        fused, again = results(LinkPeer(link, link)), results(LinkPeer(link, link))
    for name, true_values in truth.items():
        check_budget(name, fused[name], eager[name], true_values, dtype)
        assert torch.equal(fused[name], again[name]), f"{name}: two equal calls gave different bits"
    errors = {FUSED: fused} | {name: results(peer, bound) for name, peer in peers.items()}
    return {
        name: max(relative_error(value, truth[key][: len(value)]) for key, value in values.items())
        for name, values in errors.items()
    }


def _runs(run: Callable[..., Result], *draws: Tensor, bound: TimeBound | None) -> list[Result]:
    """``run`` on entry after entry of ``draws``; with a bound on no more of them once a call's time is spent."""
    found: list[Result] = []
    end = None if bound is None else bound.now() + bound.call_seconds
    for operands in zip(*draws, strict=True):
        found.append(run(*operands))
        if bound is not None and bound.now() > end:
            break
    return found


def _draws(tokens: int) -> int:
    """How often ``tokens`` rows are drawn: a maximum over a handful of values says little about either side."""
    return max(1, GATE_ROWS // tokens)
