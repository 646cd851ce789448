"""From samples to records, files, tables and the README; times are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.goals import Goal
from benchmarks.harness.growth import GrowthCase, growth_labels, growth_record
from benchmarks.harness.record import SCHEMA, Labels, make_record
from benchmarks.harness.shapes import INNER
from benchmarks.report import __main__ as report
from benchmarks.report import tables
from benchmarks.report.stored import ORDER, load
from benchmarks.suites.cpu.frozen_cases import SUITES

SLUG = "cpu-test"


class FakeLimits:
    """A machine of 100 GB/s and 1 TFLOP/s."""

    memory_stream = 1e11

    def stream(self, size: int) -> float:
        return 1e11

    def product(self, dtype: torch.dtype) -> float:
        return 1e12


def link_record(tokens: int = 8, fused: float = 1e-3, goal: Goal | None = Goal(2.0, 2.4)) -> dict[str, Any]:  # noqa: B008
    samples = {
        "fused": [fused] * 30,
        "eager": [3e-3] * 30,
        "products": [0.5e-3] * 30,
        "reads": [0.25e-3] * 30,
        "eager (again)": [3.03e-3] * 30,
    }
    labels = Labels("link", "inner", "2048x2048x2048", torch.float32, "forward", tokens)
    work = floors.link_forward(INNER, tokens, 4)
    return make_record(labels, "warm", work, FakeLimits(), samples, {"fused": 1e-7}, {}, goal)  # type: ignore[arg-type]


def write_run(path: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    meta = {
        "schema": SCHEMA,
        "date": "2026-01-01T00:00:00+00:00",
        "grid": "full",
        "git": {"commit": "abc", "dirty": False},
        "device": {"name": "A chip", "slug": SLUG, "threads": 2, "caches": {}, "instruction_set": {"used": "avx2"}},
        "versions": {"torch": "2.13.0"},
        "limits": {"stream_gbps": {"1 MiB": 100.0}, "product_gflops": {"float32": 1000.0}},
    }
    benchmarks = [{"extra_info": {"record": record}} for record in records] + [{"extra_info": {}}]
    path.write_text(json.dumps({"recmas": meta | changes, "benchmarks": benchmarks}))
    return path


def test_record_holds_every_column() -> None:
    record = link_record()
    assert record["floor_us"] == pytest.approx(record["bytes_min"] / 1e11 * 1e6)
    assert record["bound"] == "weights"
    fused = record["impls"]["fused"]
    assert fused["t_us"] == {"p20": 1000.0, "p50": 1000.0, "p80": 1000.0, "n": 30}
    assert fused["sol_pct"] == pytest.approx(100 * record["floor_us"] / 1000)
    assert fused["gemm_ceiling_pct"] == pytest.approx(50)
    assert fused["read_ceiling_pct"] == pytest.approx(25)
    assert fused["gflops"] == pytest.approx(record["flops"] / 1e-3 / 1e9)
    assert fused["err"] == 1e-7
    assert len(fused["samples_us"]) == 30
    assert record["ratios"].keys() == {"eager"}
    assert record["ratios"]["eager"]["value"] == pytest.approx(3.0)
    assert record["noise"] == pytest.approx(1.01)
    assert record["missed"] is None


def test_missed_goal_is_recorded_and_told() -> None:
    record = link_record(fused=2e-3)
    assert record["missed"] == "1.50x eager [1.50, 1.50], must be 2.00x"
    assert "**missed**" in tables.full_table([record])
    assert "0 of 1 goals met" in tables.goals([record])


def test_ratio_within_the_noise_is_not_reported() -> None:
    assert tables.ratio_text(link_record(fused=3e-3, goal=None), "eager") == "≈ 1"
    assert tables.ratio_text(link_record(), "compile") == "–"
    assert tables.ratio_text(link_record(), "eager") == "3.00× [3.00, 3.00]"


def test_pipes_in_cells_are_escaped() -> None:
    assert tables.table(["|V|"], [["a"]]).splitlines()[0] == r"| \|V\| |"


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (1234.5, "1230"), (0.01234, "0.0123"), (2.0, "2")])
def test_numbers(value: float | None, text: str) -> None:
    assert tables.number(value) == text


def test_durations() -> None:
    assert tables.duration(12.34) == "12.3 µs"
    assert tables.duration(12345.0) == "12.3 ms"


def test_an_imitated_processor_gets_a_page_and_no_place_in_the_readme(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    slug = "cpu-a-chip-25-17-as-avx2-2-threads"
    device = {"name": "A chip", "slug": slug, "threads": 2, "caches": {}, "instruction_set": {"used": "avx2"}}
    runs = [write_run(tmp_path / "own.json", [link_record(1)])]
    runs += [write_run(tmp_path / "imitated.json", [link_record(8)], device=device)]
    assert report.main([*map(str, runs), "--results", str(results), "--readme", str(readme)]) == 0
    assert "# A chip (family 25, model 17) imitating avx2, 2 threads" in (results / slug / "README.md").read_text()
    assert "1 tokens" in readme.read_text()
    assert "8 tokens" not in readme.read_text()


def test_run_becomes_files_page_plot_and_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    run = write_run(tmp_path / "run.json", [link_record(1), link_record(8)])
    arguments = [str(run), "--results", str(results), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert "2 of 2 goals met" in capsys.readouterr().out

    stored = json.loads((results / SLUG / "link.json").read_text())
    assert stored["device"]["name"] == "A chip"
    assert [record["tokens"] for record in stored["records"]] == [1, 8]
    assert "| inner | 2048x2048x2048 | float32 | forward | 8 | warm |" in (results / SLUG / "README.md").read_text()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| inner, 2048x2048x2048, 1 tokens, forward | float32 | 1 ms | 3.00× eager |" in text
    assert "8 tokens" not in text, "the README shows three sizes; the page shows all"
    assert "2 of 2 goals met." in text

    plot = (results / SLUG / "link.svg").read_bytes()
    assert report.main(arguments) == 0
    assert (results / SLUG / "link.svg").read_bytes() == plot
    assert readme.read_text() == text


def test_suites_come_in_the_order_of_the_report(tmp_path: Path) -> None:
    for name in ("another", "complexity", "system", "frozen", "cluster", "link"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": {"slug": tmp_path.name}}))
    assert list(load(tmp_path)) == ["link", "frozen", "system", "cluster", "complexity", "another"]


def test_the_order_names_every_suite_of_a_cpu() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (report.ROOT / "benchmarks/suites/cpu").glob("*.py")]
    named = {name for text in texts for name in re.findall(r'\bLabels\(\s*"(\w+)"', text)}
    assert named | {*SUITES.values(), growth_labels("", "")["suite"]} == set(ORDER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grid": "quick"}, "of the quick grid"), ({"schema": 0}, f"has schema 0, expected {SCHEMA}")],
)
def test_unfit_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run.json", [link_record()], **changes)
    results = tmp_path / "results"
    results.mkdir()
    assert report.main([str(run), "--results", str(results)]) == 2
    assert message in capsys.readouterr().err
    assert not list(results.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmarks": []}'])
def test_files_that_are_no_run_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    run = tmp_path / "run.json"
    run.write_text(content)
    assert report.main([str(run), "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run} is not a benchmark run")
    assert error.count("\n") == 1


def test_fits_get_a_table_of_their_own_and_count_as_goals(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    grown = [[1.0 + size] * 3 for size in (1, 2, 4)]
    linear = GrowthCase("text step", "|V|", 1, (1, 2, 4), ())
    flat = GrowthCase("latent turn", "|V|", 0, (1, 4), ())
    turn = {"features": 8, "vocabulary": 9, "prompt": 3, "steps": 2, "text": 3.0, "latent": 2.0}
    turns = {
        **growth_labels("whole turns", "all"),
        "terms": [{"name": "1", "coefficient": 2e-9, "low": 1e-9, "high": 3e-9}],
        "head_over_least": 1.25,
        "r2": 0.999,
        "turns": [turn],
        "goal": {"within": None, "r2": 0.995},
        "missed": None,
    }
    records = [growth_record(linear, (1, 2, 4), grown), growth_record(flat, (1, 4), [[1.0] * 3, [2.0] * 3]), turns]
    run = write_run(tmp_path / "run.json", [link_record(), *records])
    assert report.main([str(run), "--results", str(results), "--readme", str(readme)]) == 0
    page = (results / SLUG / "README.md").read_text()
    assert (
        r"| text step | \|V\| = 1 to 4 | 2000 ms to 5000 ms (2.50×) | 1.00 [1.00, 1.00] | 1.0000 | 1 ± 0.1: met |"
        in page
    )
    assert "must stay: **missed**" in page
    assert "| 1 | 2 | 1 to 3 |" in page
    assert "from 1.50× (d=8, |V|=9, t=3, m=2)" in page
    assert "- missed: latent turn over |V| float32 forward T=4 (warm): grows 2.00x, must at most 1.10x" in page
    assert "3 of 4 goals met" in readme.read_text()
