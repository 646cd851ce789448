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
from typing import Any

import numpy as np
import torch

from benchmarks.harness.names import AGAIN
from benchmarks.harness.time_bound import LEAST_ROUNDS, TimeBound, Unmeasured

MIN_ROUNDS = 30
MAX_ROUNDS = 200
WARMUP_ROUNDS = 3  # the second call may pack weights, so the third is the first steady one
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


@dataclass
class Measured:
    """What a comparison gave.

    Attributes:
        samples: seconds per call, by variant. Entry i of each belongs to round i, of which a slow peer has only the
            first ones.
        unmeasured: peers that are over their bound, and so have no samples.
    """

    samples: dict[str, list[float]]
    unmeasured: dict[str, Unmeasured]


def measure(
    benchmark: Any,
    variants: Mapping[str, Call],
    *,
    prepare: Callable[[Call], None] = warm,
    seconds: float = 2.0,
    rounds: int | None = None,
    twice: str | None = "eager",
    bound: TimeBound = TimeBound(),  # noqa: B008
) -> Measured | None:
    """Time all variants in turn; under ``--benchmark-disable`` only run each of them once.

    Args:
        benchmark: pytest-benchmark's fixture.
        variants: calls by name; the first is the one under test, which pytest-benchmark reports. A variant that
            compiles at its first call must have had it.
        prepare: puts the caches into the wanted state; runs untimed before each timed call.
        seconds: time to aim at; it sets the number of rounds within [MIN_ROUNDS, MAX_ROUNDS].
        rounds: that number itself, for peers of many seconds; then nothing is warmed up either.
        twice: the peer to time once more under its name + AGAIN; None for none. Where it is over its bound, the first
            of the others is timed twice.
        bound: a peer whose first call is over it is left out; one whose calls would take too long together takes part
            in fewer rounds. With ``rounds`` every peer takes part in one at least, however long it takes.

    Returns:
        The samples, and which peers are over their bound. None if disabled.
    """
    (name, call), *others = variants.items()
    if not benchmark.enabled:
        for _, peer_call in others:
            peer_call()
        benchmark.pedantic(call)
        return None
    turns = _Turns(dict(others), prepare, bound)
    if rounds is None:
        turns.leave_out_slow()
    turns.repeat(twice)

    def run_peers() -> None:
        turns.run(record=recording)
        prepare(call)

    recording = False
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        longest = 0.0
        for _ in range(WARMUP_ROUNDS if rounds is None else 0):
            start = bound.now()
            run_peers()
            call()
            longest = bound.now() - start
        if rounds is None:
            rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds / longest)))
        recording = True
        benchmark.pedantic(call, setup=run_peers, rounds=rounds)
    finally:
        if collecting:
            gc.enable()
    return Measured({name: list(benchmark.stats.stats.data), **turns.samples}, turns.unmeasured)


class _Turns:
    """The peers of one comparison, which run once per round in an order that changes."""

    def __init__(self, peers: dict[str, Call], prepare: Callable[[Call], None], bound: TimeBound) -> None:
        self._peers, self._prepare, self._bound = peers, prepare, bound
        self._order = random.Random(0)
        self._rounds: dict[str, int] = {}  # in which a slow peer takes part
        self.samples: dict[str, list[float]] = {name: [] for name in peers}
        self.unmeasured: dict[str, Unmeasured] = {}

    def leave_out_slow(self) -> None:
        """Call each peer once; drop those over their bound, and count the rounds of those that are merely slow."""
        for name, call in list(self._peers.items()):
            elapsed = self._bound.seconds_of(call)
            if (over := self._bound.over(elapsed)) is not None:
                self.unmeasured[name] = over
                del self._peers[name], self.samples[name]
            else:
                self._limit(name, elapsed, LEAST_ROUNDS)

    def repeat(self, name: str | None) -> None:
        """Let peer ``name`` run twice per round, or the first one, where ``name`` is left out; None for no peer."""
        if name is None or not self._peers:
            return
        if name not in self._peers:
            name = next(iter(self._peers))
        self._peers[name + AGAIN], self.samples[name + AGAIN] = self._peers[name], []
        if name in self._rounds:
            self._rounds[name + AGAIN] = self._rounds[name]

    def run(self, record: bool) -> None:
        """One round."""
        for name in self._order.sample(list(self._peers), len(self._peers)):
            taken = self.samples[name]
            # A slow peer's first call has warmed it up.
            if name in self._rounds and (not record or len(taken) >= self._rounds[name]):
                continue
            self._prepare(self._peers[name])
            elapsed = self._bound.seconds_of(self._peers[name])
            if record:
                taken.append(elapsed)
                if len(taken) == 1 and name not in self._rounds:
                    self._limit(name, elapsed, 1)

    def _limit(self, name: str, elapsed: float, least: int) -> None:
        if (rounds := self._bound.rounds(elapsed, least)) < MIN_ROUNDS:
            self._rounds[name] = rounds
