"""The links' time: fused against eager, taken in turns so that a busy machine is unfair to neither."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recmas_kernels import FusedRecursiveLink, RecursiveLink, packed

WIDTH = 2048
"""Of the links that are timed: that of a language model of 1.5 to 2 billion parameters."""


@dataclass(frozen=True)
class LinkTime:
    """Medians in microseconds of one call without gradients, and the 20th and 80th percentile beside them."""

    name: str
    tokens: int
    fused: float
    eager: float
    fused_spread: tuple[float, float]
    eager_spread: tuple[float, float]


def link_times() -> list[LinkTime]:
    """An inner and an outer link of the released shapes, on few tokens (a rollout) and on many (a handoff)."""
    inner, outer = FusedRecursiveLink.inner(WIDTH), FusedRecursiveLink.outer(WIDTH, WIDTH)
    return [
        *(link_time(f"inner {WIDTH}", inner, tokens) for tokens in (1, 4, 16, 64)),
        *(link_time(f"outer {WIDTH} -> {WIDTH}", outer, tokens) for tokens in (32, 128)),
    ]


@torch.no_grad()
def link_time(name: str, link: RecursiveLink, tokens: int, seconds: float = 1.0) -> LinkTime:
    """Call the link and its eager twin by turns for about ``seconds`` on ``tokens`` random rows (fp32).

    The link's weights are packed, as an answer packs them.
    """
    eager = RecursiveLink(link.config)
    eager.load_state_dict(link.state_dict())
    x = torch.randn(tokens, link.config.in_features)
    calls = (link, eager.requires_grad_(False))
    times: tuple[list[float], list[float]] = ([], [])
    with packed(link):
        for call in (*calls, *calls, *calls):
            call(x)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 5:
            for call, taken in zip(calls, times, strict=True):
                taken.append(_timed(call, x))
    fused_time, eager_time = (statistics.median(taken) * 1e6 for taken in times)
    return LinkTime(name, tokens, fused_time, eager_time, _spread(times[0]), _spread(times[1]))


def _spread(seconds: list[float]) -> tuple[float, float]:
    """20th and 80th percentile, in microseconds."""
    first, *_, last = statistics.quantiles(seconds, n=5, method="inclusive")
    return first * 1e6, last * 1e6


def _timed(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    started = time.perf_counter()
    call(x)
    return time.perf_counter() - started


def time_table(times: Iterable[LinkTime]) -> str:
    """The times as text, a line each: medians, p20 to p80 in brackets."""
    lines = ["{:<20} {:>6} {:>24} {:>24} {:>8}".format("link", "tokens", "fused us", "eager us", "speedup")]
    for row in times:
        fused, eager = _told(row.fused, row.fused_spread), _told(row.eager, row.eager_spread)
        lines.append(f"{row.name:<20} {row.tokens:>6} {fused:>24} {eager:>24} {row.eager / row.fused:>7.2f}x")
    return "\n".join(lines)


def _told(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.1f} [{spread[0]:.0f}, {spread[1]:.0f}]"
