"""Ratios, their intervals and the order of calls; nothing here depends on how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.goals import Goal
from benchmarks.harness.names import AGAIN
from benchmarks.harness.timing import WARMUP_ROUNDS, Quantiles, Ratio, measure


class FakeBenchmark:
    """What `measure` uses of pytest-benchmark's fixture."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Callable[[], object], setup: Any = None, rounds: int = 1) -> None:
        for _ in range(rounds):
            if setup is not None:
                setup()
            target()
            self.stats.stats.data.append(1.0)


def normal(mean: float, seed: int, rounds: int = 200) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 0.05 * mean, rounds))


def test_quantiles() -> None:
    assert Quantiles.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Quantiles(2.0, 3.5, 5.0, 6)


def test_ratio_of_medians_lies_in_a_tight_interval() -> None:
    ratio = Ratio.of(normal(2.0, seed=1), normal(1.0, seed=2))
    assert ratio.low < 2.0 < ratio.high
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.high - ratio.low < 0.1


def test_outliers_do_not_move_the_ratio() -> None:
    slow, fast = normal(2.0, seed=1), normal(1.0, seed=2)
    assert Ratio.of([*slow[:-10], *[100.0] * 10], fast).value == pytest.approx(Ratio.of(slow, fast).value, rel=0.02)


def test_ratio_needs_equally_many_rounds() -> None:
    with pytest.raises(ValueError, match="slower has 2 rounds, faster has 1"):
        Ratio.of([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (Ratio(1.01, 0.99, 1.03), 1.0, True),
        (Ratio(1.10, 1.05, 1.15), 1.0, False),
        (Ratio(1.10, 1.05, 1.15), 1.06, True),
        (Ratio(0.90, 0.85, 0.93), 1.06, False),
        (Ratio(0.90, 0.85, 0.95), 1.06, True),
    ],
)
def test_within_noise(ratio: Ratio, noise: float, expected: bool) -> None:
    assert ratio.is_within(noise) is expected


@pytest.mark.parametrize(
    ("goal", "ratio", "microseconds", "missed"),
    [
        (Goal(2.0), Ratio(2.1, 2.0, 2.2), 1.0, None),
        (Goal(2.0), Ratio(1.9, 1.8, 2.1), 1.0, "must be 2.00x"),
        (Goal(), Ratio(0.9, 0.88, 0.92), 1.0, "must be 0.95x"),
        (Goal(), Ratio(0.94, 0.88, 1.01), 1.0, None),  # not told apart from equal
        (Goal(1.0, must_us=25), Ratio(2.0, 1.9, 2.1), 26.0, "must be at most 25 us"),
    ],
)
def test_goal(goal: Goal, ratio: Ratio, microseconds: float, missed: str | None) -> None:
    said = goal.missed(ratio, 1.0, microseconds)
    assert (said is None) if missed is None else (said is not None and missed in said)


def test_variants_take_turns() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("fused", "eager", "addmm")}
    measured = measure(FakeBenchmark(), variants, rounds=8, prepare=lambda call: None)
    assert measured is not None
    assert {name: len(values) for name, values in measured.samples.items()} == dict.fromkeys(
        ("fused", "eager", "addmm", "eager" + AGAIN), 8
    )
    timed = calls[-8 * 4 :]
    for start in range(0, len(timed), 4):
        assert sorted(timed[start : start + 3]) == ["addmm", "eager", "eager"]
        assert timed[start + 3] == "fused"
    assert len({tuple(timed[start : start + 4]) for start in range(0, len(timed), 4)}) > 1


def test_each_timed_call_is_prepared() -> None:
    calls: list[str] = []

    def call() -> None:
        calls.append("call")

    measure(FakeBenchmark(), {"fused": call}, rounds=2, twice=None, prepare=lambda call: calls.append("prepare"))
    assert calls == ["prepare", "call"] * 2


def test_warms_up_before_it_records() -> None:
    calls: list[str] = []
    variants = {"fused": lambda: calls.append("fused"), "eager": lambda: calls.append("eager")}
    measured = measure(FakeBenchmark(), variants, seconds=0, prepare=lambda call: None)
    assert measured is not None
    assert calls.count("fused") == WARMUP_ROUNDS + len(measured.samples["eager"])


def test_disabled_runs_each_variant_once() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("fused", "eager")}
    assert measure(FakeBenchmark(enabled=False), variants) is None
    assert sorted(calls) == ["eager", "fused"]
