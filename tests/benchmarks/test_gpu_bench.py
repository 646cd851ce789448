"""A GPU cell from its variants to its record, and a whole session, with the device's clock made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.floors import Work
from benchmarks.harness.gpu import bench
from benchmarks.harness.gpu.bench import PRODUCTS_LT, GpuBench
from benchmarks.harness.gpu.forecast import ROWS
from benchmarks.harness.gpu.run_file import RunFile
from benchmarks.harness.names import PRODUCTS
from benchmarks.harness.record import Labels
from benchmarks.harness.timing import Call
from tests.benchmarks.test_gpu_tables import HEAD, FakeLimits
from tests.runtime.commands import Ended, module

ROOT = Path(__file__).resolve().parents[2]
LABELS = Labels("link", "inner", "2048x2048x2048", torch.bfloat16, "forward", 1, cold=True, graph=True)
WORK = Work(16_777_216, 16_800_000, 16_777_216)


class FakeGraph:
    """Takes so long per call as the call says when it is called."""

    recorded: list[int] = []  # noqa: RUF012

    def __init__(self, calls: Sequence[Call], count: int) -> None:
        self._seconds = sum(float(calls[index % len(calls)]()) for index in range(count))  # type: ignore[arg-type]
        self.recorded.append(count)

    def seconds(self) -> float:
        return self._seconds


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> GpuBench:
    FakeGraph.recorded.clear()
    monkeypatch.setattr(bench.cuda, "Graph", FakeGraph)
    monkeypatch.setattr(bench.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench.cuda, "release", lambda: None)
    monkeypatch.setattr(bench.cuda, "launches", lambda call: 2)
    monkeypatch.setattr(bench.cuda, "peak_bytes", lambda call: 4096)
    monkeypatch.setattr(bench.cuda, "clock_and_temperature", lambda: (1980.0, 40.0))
    monkeypatch.setattr(bench, "CELL_WARM_SECONDS", 0.0)
    monkeypatch.setattr(bench, "CELL_SECONDS", 0.0)
    return GpuBench(RunFile(None, dict), torch.device("cpu"), FakeLimits(), HEAD["device"])


def calls(microseconds: float, count: int = 17) -> Callable[[], list[Call]]:
    return lambda: [lambda: microseconds * 1e-6] * count


def unbuildable() -> Sequence[Call]:
    raise RuntimeError("no template\nfor this shape")


def test_a_cell_becomes_a_record(gpu_bench: GpuBench) -> None:
    builders = {"fused": calls(9.0), "eager": calls(18.0), PRODUCTS: calls(8.0), PRODUCTS_LT: calls(7.0)}
    gpu_bench.measure(LABELS, builders, WORK, {"fused": 1e-3}, ROWS["inner T=1, cold"])
    (record,) = gpu_bench.run.records
    assert record["impls"]["fused"]["t_us"]["p50"] == pytest.approx(9.0)
    assert record["impls"]["fused"]["launches"] == 2
    assert record["impls"]["fused"]["gemm_ceiling_pct"] == pytest.approx(100 * 7 / 9), "the faster library counts"
    assert PRODUCTS_LT not in record["impls"]
    assert record["ratios"].keys() == {"eager"}
    assert record["noise"] == pytest.approx(1.0)
    assert (record["cache"], record["graph"]) == ("cold", True)
    assert record["floor_us"] == pytest.approx(5.6)
    assert record["missed"] is None
    assert (record["clock_mhz"], record["celsius"]) == (1980.0, 40.0)
    # 17 copies once, to see how long a call is; then 51 of the short ones, three of each copy.
    assert set(FakeGraph.recorded) == {17, 51}


def test_a_peer_that_fails_is_left_out_and_named(gpu_bench: GpuBench) -> None:
    builders = {"fused": calls(11.0), "eager": calls(18.0), "compile-max": unbuildable}
    gpu_bench.measure(LABELS, builders, WORK, {}, ROWS["inner T=1, cold"])
    (record,) = gpu_bench.run.records
    assert record["failed_peers"] == {"compile-max": "RuntimeError: no template"}
    assert record["missed"].startswith("11.0 us, forecast at most 10; 1.64x eager")


def test_what_is_under_test_may_not_fail(gpu_bench: GpuBench) -> None:
    with pytest.raises(RuntimeError, match="no template"):
        gpu_bench.measure(LABELS, {"fused": unbuildable, "eager": calls(18.0)}, WORK, {})
    assert gpu_bench.run.records == []


def test_answers_need_nothing_under_test(gpu_bench: GpuBench) -> None:
    gpu_bench.answer("1: which", "T=1", {"cublas": calls(12.0), "other": unbuildable}, work=WORK, watts=1.0)
    (answer,) = gpu_bench.run.answers
    assert answer["t_us"]["cublas"]["p50"] == pytest.approx(12.0)
    assert answer["gbps"]["cublas"] == pytest.approx(1400.0)
    assert answer["failed"] == {"other": "RuntimeError: no template"}
    assert answer["watts"] == 1.0


def test_bare_calls_are_timed_by_the_hosts_clock(gpu_bench: GpuBench) -> None:
    ran: list[int] = []
    clock = bench.host_clock([lambda: ran.append(0), lambda: ran.append(1)])
    ran.clear()
    assert clock() > 0
    assert ran == [0, 1] * (bench.HOST_CALLS // 2)


def test_without_a_device_every_call_runs_and_nothing_is_kept() -> None:
    ran: list[int] = []
    builders = {"fused": lambda: [lambda: ran.append(0), lambda: ran.append(1)], "eager": lambda: [lambda: None]}
    untimed = GpuBench(RunFile(None, dict), torch.device("cpu"))
    untimed.measure(LABELS, builders, WORK, {})
    assert ran == [0, 1]
    assert untimed.run.records == []
    with pytest.raises(RuntimeError, match="no template"):
        untimed.measure(LABELS, {"fused": lambda: [], "eager": unbuildable}, WORK, {})


# A pytest plugin: the CPU plays a device on which a call takes ten microseconds.
FAKE_DEVICE = """
import pytest
import torch
from contextlib import nullcontext
from benchmarks.harness.gpu import bench, cuda, limits
from tests.benchmarks.test_gpu_tables import FakeLimits


class Graph:
    def __init__(self, calls, count):
        for call in calls:
            call()
        self.count = count

    def seconds(self):
        return 1e-5 * self.count


class Limits(FakeLimits):
    def __init__(self, l2_bytes):
        pass

    def measured(self):
        return {{"stream_gbps": {{}}, "product_gflops": {{}}}}


cuda.available = lambda: True
cuda.device = lambda: torch.device("cpu")
cuda.facts = lambda: {facts!r}
cuda.settle = lambda seconds: None
cuda.side_stream = cuda.blas = lambda *_: nullcontext()
cuda.synchronize = cuda.release = lambda: None
cuda.launches, cuda.peak_bytes = (lambda call: 1), (lambda call: 0)
cuda.clock_and_temperature = lambda: (None, None)
cuda.Graph, limits.GpuLimits = Graph, Limits
bench.CELL_WARM_SECONDS = bench.ANSWER_WARM_SECONDS = bench.CELL_SECONDS = bench.ANSWER_SECONDS = 0
bench.HOST_CALLS = 2


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    cases = getattr(metafunc.module, "cases", None)
    if {small!r} and cases is not None and not hasattr(cases, "small"):
        metafunc.module.cases = lambda full: cases(False)
        metafunc.module.cases.small = True
"""


def session(
    tmp_path: Path, *arguments: str, device: bool, small: bool = False, suites: str = "benchmarks/suites/gpu"
) -> tuple[Ended, Path]:
    facts: dict[str, Any] = dict(HEAD["device"])  # type: ignore[call-overload]
    facts["l2_bytes"] = 4096 if small else facts["l2_bytes"]  # small operands would need thousands of copies
    (tmp_path / "fake_device.py").write_text(FAKE_DEVICE.format(facts=facts, small=small) if device else "")
    records = tmp_path / "bench.json"
    words = [suites, "-q", "-p", "fake_device", "-p", "no:cacheprovider", "--records", str(records), *arguments]
    return module(tmp_path, "pytest", *words, places=(ROOT, tmp_path)), records


def test_a_session_whose_time_is_spent_says_what_it_left_out(tmp_path: Path) -> None:
    done, records = session(tmp_path, "--grid", "full", "--seconds", "0", "-p", "no:benchmark", device=True)
    assert done.status == 0, done.out + done.err
    content = json.loads(records.read_text())
    assert content["benchmarks"] == []
    left_out = content["recmas"]["not_run"]
    assert len(left_out) > 100
    assert next(iter(left_out)) == "gpu-inner-2048x2048x2048-bfloat16-T1-forward-cold-graph-1"
    assert all(reason.startswith("not run: 0 s of 0 s are left") for reason in left_out.values())
    assert content["recmas"]["device"]["name"] == "Fake H100"


def test_the_full_grid_without_a_device_is_skipped_with_its_reason(tmp_path: Path) -> None:
    links = "benchmarks/suites/gpu/test_bench_link.py"
    done, records = session(tmp_path, "--grid", "full", device=False, suites=links)
    assert done.status == 0, done.out + done.err
    assert "the full grid of the GPU suites needs a CUDA device" in done.out
    assert not records.exists()


def test_a_whole_session_from_cells_to_its_page(tmp_path: Path) -> None:
    """Every suite that runs without Triton, at small sizes: gate, variants, timing, record, answers, page."""
    done, records = session(tmp_path, "--grid", "full", "-k", "not product and not every", device=True, small=True)
    assert done.status == 0, done.out + done.err
    content = json.loads(records.read_text())
    made = [entry["extra_info"]["record"] for entry in content["benchmarks"]]
    assert {record["suite"] for record in made} == {"link", "host", "alignment", "latents", "rollout"}
    for record in made:
        assert record["failed_peers"] == {}, record["op"]
        assert record["impls"]["fused"]["t_us"]["n"] >= 5
        if record["graph"]:
            assert record["impls"]["fused"]["t_us"]["p50"] == pytest.approx(10.0)
    backward = next(record for record in made if record["pass"] == "backward")
    assert backward["ratios"].keys() == {"eager", "addmm"}
    assert backward["impls"]["products"]["gemm_ceiling_pct"] == pytest.approx(100.0)
    asked = {answer["question"][0] for answer in content["recmas"]["answers"]}
    assert asked == {"3", "4", "5", "6"}
    summary = module(tmp_path, "benchmarks.report.gpu_tables", str(records), places=(ROOT,))
    assert summary.status == 0, summary.err
    assert "0 of 15 rows of the forecast measured" in summary.out
    assert "| rollout | think 2 layers" in summary.out
