"""Side-by-side timing: variants take turns call by call, and a ratio comes with its confidence interval.

pytest-benchmark times the variant under test ("fused"); its `setup` hook runs every peer once before each of those
calls and times them with the same clock, so drift of the machine hits all alike. One peer runs twice per round under
two names: the ratio of equals is the noise floor.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.harness.names import AGAIN

MIN_ROUNDS = 30
MAX_ROUNDS = 200
WARMUP_ROUNDS = 3  # a weight is packed at its second sighting, so the third call is the first steady one
RESAMPLES = 2000

Call = Callable[[], object]


@dataclass(frozen=True)
class Quantiles:
    """20th, 50th and 80th percentile of n times, in seconds."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        p20, p50, p80 = np.percentile(np.asarray(samples), [20, 50, 80])
        return cls(float(p20), float(p50), float(p80), len(samples))


@dataclass(frozen=True)
class Ratio:
    """How many times faster one variant is than another: ratio of medians and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Sequence[float], faster: Sequence[float], seed: int = 0) -> Ratio:
        """Ratio of the median of ``slower`` to that of ``faster``; both are resampled by round, so they stay paired.

        Raises:
            ValueError: the two have different numbers of rounds.
        """
        if len(slower) != len(faster):
            raise ValueError(f"slower has {len(slower)} rounds, faster has {len(faster)}, expected equally many")
        top, bottom = np.asarray(slower), np.asarray(faster)
        rounds = np.random.default_rng(seed).integers(0, len(top), size=(RESAMPLES, len(top)))
        ratios = np.median(top[rounds], axis=1) / np.median(bottom[rounds], axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        return cls(float(np.median(top) / np.median(bottom)), float(low), float(high))

    def is_within(self, noise: float) -> bool:
        """Whether the interval reaches into ``[1/noise, noise]``: then nothing may be claimed."""
        return self.low <= noise and self.high >= 1 / noise


def warm(call: Call) -> None:
    """Leave ``call``'s operands in the caches, as far as they fit."""
    call()


class Flush:
    """Empties the caches before a timed call, by streaming through a buffer none of them holds."""

    def __init__(self, size: int) -> None:
        self._buffer = torch.ones(size // 4)

    def __call__(self, call: Call) -> None:
        self._buffer.sum()


def measure(
    benchmark: Any,
    variants: Mapping[str, Call],
    *,
    prepare: Callable[[Call], None] = warm,
    seconds: float = 2.0,
    rounds: int | None = None,
    twice: str | None = "eager",
) -> dict[str, list[float]] | None:
    """Time all variants in turn; under ``--benchmark-disable`` only run each of them once.

    Args:
        benchmark: pytest-benchmark's fixture.
        variants: calls by name; the first is the one under test, which pytest-benchmark reports.
        prepare: puts the caches into the wanted state; runs untimed before each timed call.
        seconds: time to aim at; it sets the number of rounds within [MIN_ROUNDS, MAX_ROUNDS].
        rounds: that number itself, for peers of many seconds; then nothing is warmed up either.
        twice: the peer to time once more under its name + AGAIN; None for none.

    Returns:
        Seconds per call, by variant, one entry per round; entry i of each belongs to the same round. None if disabled.
    """
    (name, call), *others = variants.items()
    if not benchmark.enabled:
        for _, peer_call in others:
            peer_call()
        benchmark.pedantic(call)
        return None
    peers = dict(others)
    if twice in peers:
        peers[twice + AGAIN] = peers[twice]
    samples: dict[str, list[float]] = {peer: [] for peer in peers}
    order = random.Random(0)
    recording = False

    def run_peers() -> None:
        for peer in order.sample(list(peers), len(peers)):
            prepare(peers[peer])
            start = perf_counter()
            peers[peer]()
            elapsed = perf_counter() - start
            if recording:
                samples[peer].append(elapsed)
        prepare(call)

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        longest = 0.0
        for _ in range(WARMUP_ROUNDS if rounds is None else 0):
            start = perf_counter()
            run_peers()
            call()
            longest = perf_counter() - start
        if rounds is None:
            rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds / longest)))
        recording = True
        benchmark.pedantic(call, setup=run_peers, rounds=rounds)
    finally:
        if collecting:
            gc.enable()
    return {name: list(benchmark.stats.stats.data), **samples}
