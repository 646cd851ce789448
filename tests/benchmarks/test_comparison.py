"""``pytest benchmarks --compare``: what a worse ratio, a machine without a record and mixed machines lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import conftest
from benchmarks.harness.machine import Device
from benchmarks.report import __main__ as report
from benchmarks.report.comparison import Comparison
from benchmarks.report.stored import RESULTS, load

SLUG = "cpu-test"
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())


def cell(ratio: float | None, tokens: int = 8, least: float | None = None, **changes: Any) -> dict[str, Any]:
    """A record; without a ratio its peer was beyond its time bound."""
    ratios = {} if ratio is None else {"eager": {"value": ratio}, "compile": {"value": 100.0}}
    unmeasured = {} if ratio is not None else {"eager": {"reason": "slow", "seconds": 5.0, "at_least": least}}
    labels = {"suite": "link", "op": "inner", "shape": "8x8", "dtype": "float32", "pass": "forward", "cache": "warm"}
    goal = {"peer": "eager", "must": 1.0}
    return {**labels, "tokens": tokens, "goal": goal, "ratios": ratios, "unmeasured": unmeasured, **changes}


def committed(folder: Path, *records: dict[str, Any], slug: str = SLUG, suite: str = "link") -> Path:
    (folder / SLUG).mkdir(parents=True, exist_ok=True)
    (folder / SLUG / f"{suite}.json").write_text(json.dumps({"device": {"slug": slug}, "records": records}))
    return folder


def compared(results: Path, *records: dict[str, Any]) -> Comparison:
    comparison = Comparison.with_committed(results, SLUG)
    for record in records:
        comparison.add(record)
    return comparison


def test_a_ratio_that_is_more_than_15_percent_worse_fails_by_name(tmp_path: Path):
    results = committed(tmp_path, cell(2.0), cell(4.0, tokens=32))
    good = compared(results, cell(1.71), cell(5.0, tokens=32))
    assert not good.failed
    assert list(good.lines()) == ["2 claimed ratios compared with the record of cpu-test, 0 worse by more than 15%"]
    worse = compared(results, cell(1.69), cell(4.0, tokens=32))
    assert worse.failed
    name = "link inner 8x8 float32 forward T=8 (warm) over eager"
    assert next(worse.lines()) == f"worse: {name}: then 2.00x, now 1.69x, 16% less"


def test_a_peer_beyond_its_bound_counts_with_what_is_known_of_it(tmp_path: Path):
    results = committed(tmp_path, cell(None, least=50.0), cell(4.0, tokens=32))
    assert not compared(results, cell(None, least=45.0), cell(None, tokens=32, least=40.0)).failed
    assert compared(results, cell(30.0)).worse == [
        "link inner 8x8 float32 forward T=8 (warm) over eager: then at least 50.00x, now 30.00x, 40% less"
    ]
    left_out = compared(results, cell(None), cell(4.0, tokens=32))
    assert (left_out.compared, left_out.failed) == (1, False)
    assert "not run" in left_out.unknown[0]


def test_cells_that_cannot_be_compared_are_named_and_never_pass_alone(tmp_path: Path):
    results = committed(tmp_path, cell(2.0))
    comparison = compared(results, cell(2.0, tokens=64), cell(2.0, dtype="bfloat16"))
    assert comparison.failed
    assert len(comparison.unknown) == 2
    assert "failed: this run measured no claimed ratio" in list(comparison.lines())[-1]
    no_ratio = cell(1.0, goal={"within": 0.1, "r2": 0.995}), cell(1.0, goal=None)
    assert compared(results, *no_ratio).unknown == []
    assert compared(results).failed


def test_a_machine_without_a_record_and_mixed_machines_are_one_line(tmp_path: Path, capsys: Any):
    results = committed(tmp_path / "results", cell(2.0))
    with pytest.raises(ValueError, match="no record of this machine type, cpu-other; .* holds cpu-test$"):
        Comparison.with_committed(results, "cpu-other")
    committed(results, cell(2.0), slug="cpu-other", suite="training")
    with pytest.raises(ValueError, match=r"training.json was measured on cpu-other: machines are not mixed"):
        Comparison.with_committed(results, SLUG)
    (tmp_path / "README.md").write_text("")
    assert report.main(["--results", str(results), "--readme", str(tmp_path / "README.md")]) == 2
    assert "machines are not mixed" in capsys.readouterr().err


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_records_compare_with_themselves(folder: Path):
    comparison = Comparison.with_committed(RESULTS, folder.name)
    for suite in load(folder).values():
        for record in suite["records"]:
            comparison.add(record)
    assert not comparison.failed
    assert comparison.compared == len(comparison.stored)
    assert comparison.unknown == []


CELLS = """
def test_cell(bench):
    bench.benchmark.pedantic(lambda: None)
    bench.benchmark.extra_info["record"] = {record!r}
    assert bench.full
"""


@pytest.mark.parametrize(
    ("ratio", "options", "code", "line"),
    [
        (2.0, ["--compare"], pytest.ExitCode.OK, "1 claimed ratios compared with the record of cpu-test, 0 worse"),
        (1.0, ["--compare"], pytest.ExitCode.TESTS_FAILED, "then 2.00x, now 1.00x, 50% less"),
        (1.0, ["--grid", "full"], pytest.ExitCode.OK, "1 passed"),
        (2.0, ["--compare", "--grid", "quick"], pytest.ExitCode.USAGE_ERROR, "records hold the full grid"),
        (None, ["--compare"], pytest.ExitCode.USAGE_ERROR, "ERROR: --compare: no record of this machine"),
    ],
)
def test_a_session_ends_as_its_ratios_do(
    ratio: float | None,
    options: list[str],
    code: pytest.ExitCode,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    results = tmp_path / "results"
    results.mkdir()
    if ratio is not None:
        committed(results, cell(2.0))
    monkeypatch.setattr(conftest, "RESULTS", results)
    monkeypatch.setattr(Device, "slug", SLUG)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    cells = tmp_path / f"test_{tmp_path.name}.py"  # a name of its own: modules of ended sessions stay
    cells.write_text(CELLS.format(record=cell(ratio)))
    arguments = [str(cells), "--rootdir", str(tmp_path), "--import-mode=importlib", *options]
    assert pytest.main(arguments, plugins=[conftest]) == code
    printed = capfd.readouterr()
    assert line in printed.out + printed.err
