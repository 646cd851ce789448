"""How the GPU suites spend their time: copies, calls per graph, rounds, turns, the budget and the order of cells."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.harness.gpu import schedule
from benchmarks.harness.gpu.forecast import ROWS
from benchmarks.harness.names import AGAIN
from benchmarks.harness.timing import MAX_ROUNDS, MIN_ROUNDS
from benchmarks.suites.gpu.link_grid import AUTOTUNED_RANK, INNER, LinkCase, link_cases
from tests.benchmarks.fake_clock import FakeClock

L2 = 50 * 2**20


@pytest.mark.parametrize("bytes_per_call", [1, 4096, 16_800_000, 28_300_000, L2, 5 * L2, 20 * L2])
def test_cold_copies_exceed_five_times_l2_before_the_first_is_used_again(bytes_per_call: int) -> None:
    count = schedule.copies(bytes_per_call, L2, cold=True)
    assert (count - 1) * bytes_per_call >= 5 * L2
    assert (count - 2) * bytes_per_call < 5 * L2, "no more copies than needed"
    assert schedule.copies(bytes_per_call, L2, cold=False) == 1


def test_the_weights_of_a_2048_wide_link_need_seventeen_copies() -> None:
    assert schedule.copies(16_777_216, L2, cold=True) == 17


@pytest.mark.parametrize("sets", [1, 2, 17, 64])
@pytest.mark.parametrize("seconds", [5e-6, 99e-6, 100e-6, 400e-6, 5e-3])
def test_a_graph_holds_every_set_equally_often(seconds: float, sets: int) -> None:
    count = schedule.calls_per_graph(seconds, sets)
    assert count % sets == 0
    if seconds < schedule.SHORT_CALL:
        assert count >= 50
    else:
        assert (count - sets) * seconds < schedule.GRAPH_SECONDS, "long calls are not repeated for nothing"


@pytest.mark.parametrize(("round_seconds", "expected"), [(1e-3, MAX_ROUNDS), (0.02, 50), (10.0, MIN_ROUNDS)])
def test_rounds(round_seconds: float, expected: int) -> None:
    assert schedule.rounds(round_seconds, seconds=1.0) == expected


def test_variants_take_turns_in_changing_order_and_eager_runs_twice() -> None:
    ran: list[str] = []
    clock = FakeClock()

    def variant(name: str, seconds: float):
        def run() -> float:
            ran.append(name)
            return clock.takes(seconds)

        return run

    clocks = {name: variant(name, seconds) for name, seconds in (("fused", 0.001), ("eager", 0.002), ("addmm", 0.003))}
    samples = schedule.interleave(clocks, seconds=0.4, warm_seconds=0.05, now=clock)
    assert samples.keys() == {"fused", "eager", "addmm", "eager" + AGAIN}
    rounds = {len(values) for values in samples.values()}
    assert rounds == {50}  # 0.4 s of rounds that take 8 ms
    assert samples["addmm"] == [0.003] * 50
    timed = [ran[start : start + 4] for start in range(0, len(ran), 4)]
    assert all(sorted(turn) == ["addmm", "eager", "eager", "fused"] for turn in timed)
    assert len(timed) - 50 == 7, "rounds of 8 ms warm up for at least 50 ms"
    assert len({tuple(turn) for turn in timed}) > 1


def test_long_rounds_warm_up_once() -> None:
    clock = FakeClock()
    samples = schedule.interleave(
        {"fused": lambda: clock.takes(1.0), "reference": lambda: clock.takes(9.0)},
        seconds=1.0,
        warm_seconds=5.0,
        twice=None,
        rounds_wanted=5,
        now=clock,
    )
    assert [len(values) for values in samples.values()] == [5, 5]
    assert clock() == 60.0


def test_the_budget_lets_in_what_fits() -> None:
    clock = FakeClock()
    budget = schedule.Budget(100.0, now=clock)
    assert budget.refusal(100.0) is None
    clock.takes(60.0)
    assert budget.refusal(40.0) is None
    assert budget.refusal(45.0) == "not run: 40 s of 100 s are left, it needs about 45 s"
    clock.takes(60.0)
    assert budget.refusal(1.0) == "not run: 0 s of 100 s are left, it needs about 1 s"
    assert schedule.Budget(None, now=clock).left == math.inf


def test_every_link_row_of_the_forecast_has_one_cell_that_comes_before_all_else() -> None:
    cases = sorted(link_cases(full=True), key=lambda case: case.rank)
    first = list(itertools.takewhile(lambda case: case.forecast is not None, cases))
    rows = [case.forecast.row for case in first if case.forecast]
    elsewhere = {"cosine T=16384", "handoff B=32 m=48", "handoff B=32 m=48, as released"}
    assert sorted(rows) == sorted(ROWS.keys() - elsewhere)
    assert len({case.id for case in cases}) == len(cases)


def test_max_autotune_comes_in_a_second_pass_over_the_same_cells() -> None:
    cases = link_cases(full=True)
    second = [case for case in cases if "compile-max" in case.peers]
    assert all(case.rank > AUTOTUNED_RANK / 2 for case in second)
    cells = {(case.op, case.shape, case.mode, case.tokens, case.cold) for case in cases if case not in second}
    assert {(case.op, case.shape, case.mode, case.tokens, case.cold) for case in second} <= cells
    assert LinkCase(INNER, 1, 1).seconds < next(iter(second)).seconds
