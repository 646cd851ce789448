"""Peers that are too slow, by a clock that is made up: what they cost, what is recorded of them, what tables say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import gate, machine
from benchmarks.harness.bench import Bench
from benchmarks.harness.floors import Work
from benchmarks.harness.goals import Goal
from benchmarks.harness.link_peer import LinkPeer
from benchmarks.harness.machine import Limits
from benchmarks.harness.names import AGAIN
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import LEAST_ROUNDS, TimeBound
from benchmarks.harness.timing import MIN_ROUNDS, WARMUP_ROUNDS, measure
from benchmarks.harness.wide_products import WideProducts
from benchmarks.peers import link as peers
from benchmarks.report import tables
from benchmarks.suites.cpu import test_bench_link as suite
from benchmarks.suites.cpu.link_grid import SMALL_INNER, LinkCase
from recmas_kernels import RecursiveLink
from recmas_kernels.testing import eager_twin, make_link, make_rows, relative_error
from tests.benchmarks.fake_clock import FakeClock
from tests.benchmarks.test_report import FakeLimits
from tests.benchmarks.test_timing import FakeBenchmark


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def bound(clock: FakeClock) -> TimeBound:
    return TimeBound(call_seconds=5.0, all_seconds=15.0, now=clock)


def nothing(call: Callable[[], object]) -> None:
    """Prepare no caches."""


def test_a_probe_of_a_slow_peer_stops_at_twice_the_bound(clock: FakeClock) -> None:
    counts: list[int] = []

    def call_on(count: int) -> None:
        counts.append(count)
        clock.takes(0.1 * count)

    over = bound(clock).probe(call_on, 512)
    assert over is not None
    assert counts == [1, 2, 4, 8, 16, 32, 64]
    assert over.reason == "over its bound of 5 s on 64 of 512 rows"
    assert over.seconds == 5.0
    assert clock() < 3 * 5.0, "all 512 rows would have taken 51 s"


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_a_probe_of_a_fast_peer_ends_with_all_rows(clock: FakeClock, rows: int) -> None:
    counts: list[int] = []
    assert bound(clock).probe(counts.append, rows) is None
    assert counts[-1] == rows
    assert counts == sorted(set(counts))


def compare(clock: FakeClock, **seconds: float) -> tuple[dict[str, int], Any]:
    """How often each variant ran, and what `measure` gave; "fused" takes a millisecond."""
    ran = dict.fromkeys(("fused", *seconds), 0)

    def variant(name: str, taken: float) -> None:
        ran[name] += 1
        clock.takes(taken)

    variants = {name: partial(variant, name, taken) for name, taken in {"fused": 1e-3, **seconds}.items()}
    return ran, measure(FakeBenchmark(), variants, prepare=nothing, seconds=0, bound=bound(clock))


def test_one_call_ends_the_measurement_of_a_peer_over_its_bound(clock: FakeClock) -> None:
    ran, measured = compare(clock, eager=40.0, addmm=2e-3)
    assert ran["eager"] == 1
    assert measured.unmeasured["eager"].reason == "over its bound of 5 s"
    assert measured.samples.keys() == {"fused", "addmm", "addmm" + AGAIN}, "the noise comes from the next peer"
    assert len(measured.samples["fused"]) == len(measured.samples["addmm"]) == MIN_ROUNDS


def test_a_slow_peer_takes_part_in_the_first_rounds(clock: FakeClock) -> None:
    ran, measured = compare(clock, eager=2e-3, addmm=3.0, other=4.9)
    assert measured.unmeasured == {}
    assert len(measured.samples["fused"]) == len(measured.samples["eager"]) == MIN_ROUNDS
    assert measured.samples["addmm"] == pytest.approx([3.0] * 5)
    assert len(measured.samples["other"]) == LEAST_ROUNDS
    assert ran["addmm"] == 1 + 5, "its first call has warmed it up"
    assert ran["fused"] == WARMUP_ROUNDS + MIN_ROUNDS


def test_with_a_given_number_of_rounds_every_peer_takes_part_once(clock: FakeClock) -> None:
    variants = {
        "fused": lambda: clock.takes(1.0),
        "reference": lambda: clock.takes(100.0),
        "fast": lambda: clock.takes(4),
    }
    measured = measure(FakeBenchmark(), variants, prepare=nothing, rounds=3, twice=None, bound=bound(clock))
    assert measured is not None
    assert {name: len(taken) for name, taken in measured.samples.items()} == {"fused": 3, "reference": 1, "fast": 3}
    assert measured.unmeasured == {}


def record_of(clock: FakeClock, goal: Goal | None, eager: float = 40.0) -> dict[str, Any]:
    """The record of a cell in which "fused" takes 0.1 s by pytest-benchmark's clock."""

    class Fixture(FakeBenchmark):
        extra_info: dict[str, Any] = {}  # noqa: RUF012

        def pedantic(self, target: Callable[[], object], setup: Any = None, rounds: int = 1) -> None:
            super().pedantic(target, setup, rounds)
            self.stats.stats.data = [0.1] * rounds

    device = type("Device", (), {"clock_mhz": lambda self: None})()
    fixture = Fixture()
    bench = Bench(fixture, device, FakeLimits(), full=False)  # type: ignore[arg-type]
    labels = Labels("link", "inner", "2048x2048x2048", torch.bfloat16, "forward+backward", 512)
    variants = {
        "fused": lambda: clock.takes(0.1),
        "eager": lambda: clock.takes(eager),
        "addmm": lambda: clock.takes(0.2),
    }
    bench.run(labels, variants, Work(10**12, 10**9), {}, goal, weighed=(), bound=bound(clock))
    record: dict[str, Any] = fixture.extra_info["record"]
    return record


def test_the_record_states_a_lower_bound_and_so_do_the_tables(clock: FakeClock) -> None:
    record = record_of(clock, Goal(3.0, 4.0))
    left_out = record["unmeasured"]["eager"]
    assert left_out == {"reason": "over its bound of 5 s", "seconds": 5.0, "at_least": pytest.approx(50.0)}
    assert record["missed"] is None
    assert "eager" not in record["ratios"]
    assert "eager" not in record["impls"]
    assert tables.ratio_text(record, "eager") == "> 50×"
    assert tables.goal_text(record) == "≥ 3.00× eager: met, aim 4.00× too"
    assert "| > 5000000 |" in tables.peer_table([record])
    assert "vs eager" in tables.full_table([record])
    assert tables.unmeasured_list([record]) == (
        "- inner 2048x2048x2048 bfloat16 forward+backward T=512 (in turn): eager: over its bound of 5 s"
    )


def test_a_goal_beyond_the_lower_bound_is_not_met(clock: FakeClock) -> None:
    missed = record_of(clock, Goal(60.0))["missed"]
    assert missed == "at least 50.00x eager, which is over its time bound; must be 60.00x"


def test_a_peer_within_its_bound_has_no_lower_bound(clock: FakeClock) -> None:
    record = record_of(clock, Goal(3.0), eager=1.0)
    assert record["unmeasured"] == {}
    assert record["ratios"]["eager"]["value"] == pytest.approx(10.0)
    assert record["impls"]["eager"]["t_us"]["n"] == 15


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_link_suite_builds_and_runs_no_peer_of_a_slow_library(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Eager, addmm and the bare products are slow in bfloat16, as they are on processors without such products."""
    built: list[str] = []

    def slow_peer(name: str, link: RecursiveLink, x: torch.Tensor) -> LinkPeer:
        built.append(name)
        peer = peers.link_peer(name, link, x)

        def forward(rows: torch.Tensor) -> torch.Tensor:
            clock.takes(0.2 * len(rows) if rows.dtype is torch.bfloat16 else 1e-3)
            return peer.forward(rows)

        return LinkPeer(forward, peer.module)

    monkeypatch.setattr(suite, "link_peer", slow_peer)
    monkeypatch.setattr(suite, "products", lambda link, count, training: lambda: clock.takes(0.2 * count))
    names = ("eager", "eager, float32", "addmm", "compile", "compile-frozen", "products")
    case = LinkCase(SMALL_INNER, torch.bfloat16, 512, training, peers=names)
    link = make_link(case.config, case.dtype)
    rows = make_rows(512, 64, dtype=case.dtype), make_rows(512, 64, dtype=case.dtype, seed=2)
    found, unmeasured = suite.within_bound(case, link, rows, bound(clock))
    assert found.keys() == {"eager, float32"}
    assert built == ["eager", "eager, float32", "addmm"]
    assert unmeasured["products"].reason == unmeasured["eager"].reason == "over its bound of 5 s on 32 of 512 rows"
    assert unmeasured["compile"].seconds is None
    assert unmeasured["compile"].reason.startswith("eager is over its bound")
    assert clock() < 60, "three peers of 102 s per call"


@pytest.mark.parametrize("errors_of", [gate.inference_errors, gate.training_errors])
def test_the_gate_compares_a_slow_peer_on_fewer_draws(clock: FakeClock, errors_of: Callable[..., Any]) -> None:
    link = make_link(SMALL_INNER)
    twin = eager_twin(link, torch.float32)
    calls: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        clock.takes(3.0)
        return twin(x)

    errors = errors_of(link, 8, {"slow": LinkPeer(forward, twin)}, bound=bound(clock))
    assert calls == [8, 8], "8 draws of 8 rows, of which the second one is over 5 s"
    assert errors["slow"] < 1e-5


@pytest.mark.parametrize("errors_of", [gate.inference_errors, gate.training_errors])
def test_the_gate_calls_no_slow_product_for_its_budget(
    errors_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a kernel that is wrong still fails."""
    link, other = make_link(SMALL_INNER, torch.bfloat16), make_link(SMALL_INNER, torch.bfloat16)
    errors_of(link, 16, {}, slow_eager=True)
    with torch.no_grad():
        other.proj2.bias[0] += 1.0  # of one feature: the norm after it would take off what all have in common
    monkeypatch.setattr(gate, "eager_twin", lambda _, dtype: eager_twin(other, dtype))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        errors_of(link, 16, {}, slow_eager=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_products_err_no_more_than_the_librarys_own(dtype: torch.dtype) -> None:
    x = make_rows(64, 256, dtype=dtype).requires_grad_()
    weight, bias = (make_rows(*shape, dtype=dtype).requires_grad_() for shape in ((128, 256), (1, 128)))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]

    def results(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.linear(x, weight, bias[0])
        return (y, *torch.autograd.grad(y.sin().sum(), (x, weight)))

    truth = results(*exact)
    with WideProducts():
        wide = results(x, weight, bias)
    own = results(x, weight, bias)
    for value, other, true in zip(wide, own, truth, strict=True):
        assert value.dtype is dtype
        error, plain = relative_error(value, true.detach()), relative_error(other, true.detach())
        # A library without such products may round more often than once, and so err by more.
        eps = torch.finfo(dtype).eps
        assert eps / 16 <= error <= 1.1 * plain + 0.01 * eps


def test_wide_products_call_no_narrow_product() -> None:
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func):
                seen.append(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    link = make_link(SMALL_INNER, torch.bfloat16)
    twin = eager_twin(link, torch.bfloat16)
    with Watch(), WideProducts():
        twin(make_rows(3, 64, dtype=torch.bfloat16).requires_grad_()).sum().backward()
    assert len(seen) == 6, "two products forward, four backward"
    assert set(seen) == {torch.float32}


def test_the_machines_limit_is_not_sought_in_a_slow_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def best(call: Callable[[], torch.Tensor]) -> float:
        out = call()
        if out.dtype is torch.bfloat16:
            sizes.append(len(out))
            return 2 * len(out) ** 3 / 0.4e9
        return 2 * len(out) ** 3 / 100e9

    monkeypatch.setattr(machine, "_best", best)
    assert Limits().product(torch.bfloat16) == pytest.approx(100e9)
    assert sizes == [256], "1024 would take five seconds a call"
