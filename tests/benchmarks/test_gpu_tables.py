"""GPU results without a GPU: verdicts on the forecast, the run file, its page, the stored copy; times are made up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.gpu.forecast import ROWS, misses, verdict
from benchmarks.harness.gpu.run_file import RunFile
from benchmarks.harness.record import SCHEMA, Labels, make_record
from benchmarks.report import __main__ as report
from benchmarks.report import gpu_tables
from benchmarks.suites.gpu.link_grid import INNER

HEAD = {
    "schema": SCHEMA,
    "date": "2026-01-01T00:00:00+00:00",
    "grid": "full",
    "git": {"commit": "abc", "dirty": False},
    "device": {
        "kind": "gpu",
        "slug": "gpu-fake",
        "name": "Fake H100",
        "sms": 132,
        "l2_bytes": 50 * 2**20,
        "driver": "1.2",
        "cuda": "13.0",
    },
    "versions": {"torch": "2.11.0"},
    "limits": {"stream_gbps": {"copy": 3000.0}, "product_gflops": {"bfloat16": 798000.0}},
}


class FakeLimits:
    """3 TB/s out of memory, 5.5 TB/s out of L2, 798 TFLOP/s."""

    memory_stream = 3.0e12

    def stream(self, size: int) -> float:
        return 5.5e12

    def product(self, dtype: torch.dtype) -> float:
        return 798e12


def record(fused_us: float, tokens: int = 1, row: str | None = "inner T=1, cold", **peers_us: float) -> dict[str, Any]:
    samples = {name: [value * 1e-6] * 30 for name, value in ({"fused": fused_us} | peers_us).items()}
    labels = Labels("link", "inner", "2048x2048x2048", torch.bfloat16, "forward", tokens, cold=True, graph=True)
    work = floors.link_forward(INNER, tokens, 2)
    made = make_record(labels, "cold", work, FakeLimits(), samples, {}, {}, None)  # type: ignore[arg-type]
    if row is not None:
        made["forecast"] = asdict(ROWS[row])
    return made


def test_floors_of_the_forecast_are_the_floors_of_the_cells() -> None:
    """The forecast's arithmetic and `floors` agree, at the rates that the forecast took."""
    made = record(9.0)
    assert made["floor_us"] == pytest.approx(ROWS["inner T=1, cold"].floor_us, rel=0.01)
    assert made["bound"] == "weights"
    assert made["graph"] is True
    assert record(100.0, tokens=4096, row="inner T=4096")["floor_us"] == pytest.approx(86, rel=0.01)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"fused_us": 9.0, "eager": 18.0}, "hit"),
        ({"fused_us": 11.0, "eager": 22.0}, "**miss**: 11.0 us, forecast at most 10"),
        ({"fused_us": 9.0, "eager": 12.0}, "**miss**: 1.33x eager, forecast at least 1.7x"),
        ({"fused_us": 9.0, "eager": 18.0, "compile-max": 9.0}, "**miss**: 1.00x compile-max, forecast at least 1.1x"),
        (
            {"fused_us": 9.0, "eager": 45.0},
            "hit; beyond it, check the baseline: 5.00x eager, forecast at most 2.2x",
        ),
    ],
)
def test_verdicts(times: dict[str, float], expected: str) -> None:
    assert verdict(record(**times)) == expected


def test_nothing_is_judged_without_a_forecast() -> None:
    assert verdict(record(9.0, row=None)) == "–"
    assert misses(asdict(ROWS["four agents, inner T=32"]), record(27.0)) == []


def test_a_cell_measured_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    run = RunFile(path, lambda: dict(HEAD))
    run.add(record(9.0, eager=18.0))
    run.add(record(9.0, tokens=32, row="inner T=32, cold", eager=18.0))
    run.add(record(8.8, eager=18.0, **{"compile-max": 11.0}))
    run.answer("2: gap", "one store", t_us={"plain": {"p50": 1.3}}, failed={"dependent launch": "RuntimeError: no"})
    run.leave_out("gpu-inner-T4096", "not run: 3 s of 500 s are left, it needs about 15 s")
    stored = json.loads(path.read_text())
    records = [entry["extra_info"]["record"] for entry in stored["benchmarks"]]
    assert [made["tokens"] for made in records] == [1, 32]
    assert records[0]["ratios"].keys() == {"eager", "compile-max"}
    assert not list(tmp_path.glob("*.new"))


def test_a_run_file_exists_before_the_first_cell_ends(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    RunFile(path, lambda: dict(HEAD)).save()
    assert json.loads(path.read_text())["benchmarks"] == []


def whole_run(path: Path) -> Path:
    run = RunFile(path, lambda: dict(HEAD))
    run.add(record(9.0, eager=18.0, compile=17.0, products=8.0))
    run.add(record(12.0, tokens=8, row=None, eager=18.0))
    run.answer("2: gap", "one store", t_us={"plain": {"p50": 1.3}}, failed={"dependent launch": "RuntimeError: no"})
    run.leave_out("gpu-inner-T4096", "not run: 3 s of 500 s are left, it needs about 15 s")
    return path


def test_the_short_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_tables.main([str(whole_run(tmp_path / "bench.json"))]) == 0
    page = capsys.readouterr().out
    assert "1 of 15 rows of the forecast measured, 1 hit." in page
    assert "| inner T=1, cold | 5.6 | 8.5–10 | 9 | 62.2 | 16–20, 18 | 15–19, 17 |" in page
    assert "| outer T=1536 forward | 33 (arithmetic) | 43–48 |" in page
    assert page.count("not measured |") == 14
    assert "copy 3000 GB/s, bfloat16 products 798 TFLOP/s" in page
    assert "| 2: gap | one store | plain 1.3 µs; dependent launch failed (RuntimeError: no) |" in page
    assert "1 cells were not run, for want of time: gpu-inner-T4096." in page


def test_another_device_is_not_held_to_the_forecast() -> None:
    text = gpu_tables.forecast_table([record(9.0, row=None)], "Fake A100")
    assert text.startswith("The forecast is for an H100; no row of it was measured on Fake A100.")


def test_a_run_is_stored_and_drawn_by_the_common_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    run = whole_run(tmp_path / "bench.json")
    assert report.main([str(run), "--results", str(results), "--readme", str(readme)]) == 0
    assert "1 of 15 rows of the forecast measured, 1 hit" in capsys.readouterr().out
    stored = json.loads((results / "gpu-fake" / "gpu.json").read_text())
    assert len(stored["records"]) == 2
    assert len(stored["answers"]) == 1
    assert "# Fake H100" in (results / "gpu-fake" / "README.md").read_text()
    assert "benchmarks/results/gpu-fake/README.md" in readme.read_text()


@pytest.mark.parametrize("content", ["", "{}", '{"recmas": {}, "benchmarks": []}'])
def test_a_file_that_is_no_run_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    assert gpu_tables.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is no GPU run")
    assert error.count("\n") == 1
    assert gpu_tables.main([str(path), str(whole_run(tmp_path / "whole.json"))]) == 2
    assert "# Fake H100" in capsys.readouterr().out
