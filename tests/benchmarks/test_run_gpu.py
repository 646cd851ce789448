"""`benchmarks.gpu.run` without a GPU: its plan and outcomes, and what it leaves when a step fails or hangs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import cells, repeat, run
from benchmarks.gpu.run import PLAN, Step
from benchmarks.harness.gpu import cuda, preflight, small_shapes
from benchmarks.peers.link_gpu import LAUNCHES
from tests.benchmarks.test_gpu_tables import whole_run

NAMES = {"PYTHON": sys.executable, "OUT": "", "SANITIZER": "", "NCU": "", "PATH": "/usr/bin:/bin"}


def test_the_plan_fits_into_one_command_of_ten_minutes():
    assert sum(step.seconds for step in PLAN) <= 570
    assert [step.name for step in PLAN if step.decides] == [step.name for step in PLAN[:3]]


@pytest.mark.parametrize("name", cells.STEPS)
def test_each_step_fits_its_seconds_by_the_account_of_its_cells(name):
    """And measures something; five seconds are left for starting."""
    (step,) = [step for step in PLAN if step.name == name]
    found = cells.cells(name)
    assert found
    assert sum(case.seconds for _, case in found) <= step.seconds - 5
    assert f"--step {name} " in run.script(step)


def test_few_tokens_are_timed_under_every_kind_of_launch():
    found = [case for _, case in cells.cells("few") if set(LAUNCHES) <= set(getattr(case, "peers", ()))]
    axes = {(case.tokens, case.cold, case.config.norm) for case in found}
    assert axes == set(product((1, 8, 32), (True, False), (True, False)))
    assert set(LAUNCHES.values()) | {("early", 100)} == set(product(("early", "late", "off"), (100, 50)))


def test_other_launches_end_with_the_call(monkeypatch):
    """Also where it fails: what is timed next would otherwise be launched in another way than its name says."""
    module = mock.Mock()
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda.native, "load", lambda name: module)
    with pytest.raises(RuntimeError, match="no memory"), cuda.launched("late", 50):
        raise RuntimeError("no memory")
    assert module.mock_calls == [mock.call.set_launches("late", 50), mock.call.set_launches()]


def test_no_cell_belongs_to_two_steps():
    ids = [case.id for name in cells.STEPS for _, case in cells.cells(name)]
    assert len(set(ids)) == len(ids)


def ran(tmp_path: Path, *plan: Step, **names: str) -> tuple[int, str, dict[str, str]]:
    """Exit code, the record, and the logs."""
    said: list[str] = []
    code = run.run(tmp_path / "out", plan, {**NAMES, "OUT": str(tmp_path / "out"), **names}, said.append)
    record = (tmp_path / "out" / "record.md").read_text()
    assert record == "".join(line + "\n" for line in said)
    return code, record, {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}


def test_every_step_leaves_its_log_and_its_line(tmp_path):
    code, record, logs = ran(tmp_path, Step("one", 5, ("echo first", "echo second")), Step("two", 5, ("echo third",)))
    assert code == 0
    assert logs == {"one": "first\nsecond\n", "two": "third\n"}
    assert "- one: passed in 0 s: second\n- two: passed in 0 s: third" in record
    assert "of 10 s" in record


def test_a_failure_that_decides_nothing_lets_the_others_run(tmp_path):
    code, record, logs = ran(tmp_path, Step("one", 5, ("(exit 3)", "echo after")), Step("two", 5, ("echo third",)))
    assert code == 1
    assert "- one: FAILED (exit 3) after 0 s: after" in record
    assert logs["two"] == "third\n"


def test_a_wrong_result_ends_the_run_and_names_what_was_not_reached(tmp_path):
    plan = Step("tests", 5, ("false",), decides=True), Step("few", 5, ("echo",)), Step("many", 5, ("echo",))
    code, record, logs = ran(tmp_path, *plan)
    assert code == 1
    assert "- tests: FAILED (exit 1)" in record
    assert "Not reached: few, many." in record
    assert logs.keys() == {"tests"}


@pytest.mark.parametrize(
    ("status", "last", "ends"),
    [
        (0, "5 passed in 3.00s", False),
        (1, "5 passed in 3.00s", True),
        (124, "400 passed, 30 skipped in 58.10s", False),
        (124, "1 failed, 400 passed in 58.10s", True),
        (124, "400 passed, 2 errors in 58.10s", True),
        (124, "[7/9] Building CUDA object", True),
        (137, "400 passed in 58.10s", True),
    ],
)
def test_tests_that_were_interrupted_before_one_failed_end_nothing(status, last, ends):
    assert run.wrong(status, last) == ends


def test_a_module_that_serves_no_call_ends_the_run(tmp_path):
    """Its tests would all be skipped, and something else be timed."""
    if cuda.available():
        pytest.skip("with a device it serves")
    code, record, _ = ran(tmp_path, Step("build", 60, (run.USABLE,), decides=True), Step("few", 5, ("echo",)))
    assert code == 1
    assert "- build: FAILED (exit 1)" in record
    assert run.USABLE in run.script(PLAN[0])


def test_a_step_that_hangs_is_interrupted_and_says_what_it_knew(tmp_path):
    """As by Ctrl-C: pytest names the tests that failed before."""
    program = (
        "import time\ntry:\n    print('one failed', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('summary of what failed', flush=True)"
    )
    code, record, logs = ran(
        tmp_path, Step("slow", 1, (f'$PYTHON -c "{program}"', "echo begun afterwards")), Step("next", 5, ("echo on",))
    )
    assert code == 1
    assert "- slow: INTERRUPTED after 1 s, which is its limit: summary of what failed" in record
    assert logs["slow"] == "one failed\nsummary of what failed\n"
    assert "- next: passed" in record


def test_the_record_is_there_while_the_run_goes_on(tmp_path):
    code, _, logs = ran(tmp_path, Step("one", 5, ("echo first",)), Step("two", 5, ("cat $OUT/record.md",)))
    assert code == 0
    assert "- one: passed in 0 s: first" in logs["two"]


def test_a_tool_that_is_missing_is_counted_as_skipped(tmp_path):
    code, record, _ = ran(tmp_path, Step("sanitize", 5, ("$SANITIZER --tool memcheck",)))
    assert code == 0
    assert "- sanitize: skipped: no sanitizer in CUDA_HOME, PATH or /usr/local/cuda" in record


def test_results_of_an_earlier_run_do_not_stay(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("two.log", "few.json", "mine.txt"):
        (tmp_path / "out" / name).write_text("old")
    ran(tmp_path, Step("one", 5, ("false",), decides=True), Step("two", 5, ("echo",)), Step("few", 5, ("echo",)))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"record.md", "one.log", "all.tar.gz", "mine.txt"}


def test_one_archive_holds_what_there_is_after_each_step(tmp_path):
    packed = "tar xzOf $OUT/all.tar.gz"
    _, record, logs = ran(tmp_path, Step("one", 5, ("echo 1 | tee $OUT/one.json",)), Step("two", 5, (packed,)))
    assert logs["two"] == record.partition("- two")[0] + "1\n" * 2
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as archive:
        assert archive.getnames() == ["record.md", "one.log", "one.json", "two.log"]
        assert archive.extractfile("record.md").read().decode() == record


def test_the_last_step_adds_the_tables_of_all_results_to_the_record(tmp_path):
    assert PLAN[-1].name == "tables"
    place = tmp_path / "out"
    results = Step("few", 5, tuple(f"cp {whole_run(tmp_path / name)} $OUT/" for name in ("few.json", "many.json")))
    names = {**run.environment(place), "PYTHON": sys.executable}
    assert run.run(place, [results, Step("many", 5, ()), replace(PLAN[-1], seconds=60)], names, str) == 0
    record = (place / "record.md").read_text()
    assert record.count("\n# Fake H100\n") == 2
    assert record.count("1 of 15 rows of the forecast measured, 1 hit.") == 2


ABSENT = ("jsonargparse", "ray", "fastapi", "uvicorn", "datasets", "math_verify")


def test_what_runs_on_a_device_imports_what_such_a_machine_has():
    """No command line and no extras, and a transformers of some months ago, which had no DummyLayer."""
    files = run.environment(Path())["FILES"].split()
    assert "tests/runtime/devices/test_offload.py" in files
    common = "'--collect-only', '-q', '-p', 'no:cacheprovider', '-p', 'no:benchmark'"
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
        "from transformers import cache_utils; vars(cache_utils).pop('DummyLayer', None); import pytest\n"
        f"tests = pytest.main([{common}, '-m', 'gpu', *{files!r}])\n"
        f"sys.exit(tests or pytest.main([{common}, '--grid', 'full', 'benchmarks/suites/gpu']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=run.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tests collected") == 2


def test_repeated_calls_are_compared_bit_by_bit(monkeypatch, capsys):
    assert repeat.main(["--device", "cpu", "--calls", "12"]) == 0
    assert capsys.readouterr().out.count(": 0 calls with other bits") == 6
    calls = iter(range(10**6))
    link = lambda x: x + (next(calls) % 3 == 2)  # noqa: E731
    assert repeat._different(link, torch.zeros(2, 2), torch.ones(4), 12) > 0


def test_the_plan_is_printed(capsys):
    assert run.main(["--plan"]) == 0
    printed = capsys.readouterr().out
    assert all(step.name in printed for step in PLAN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device it would run")
def test_without_a_device_one_line_says_so_and_nothing_is_written(tmp_path, capsys):
    assert run.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("make gpu cannot run with")
    assert "torch" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_preflight_names_everything_that_is_missing(monkeypatch):
    monkeypatch.setattr(preflight, "MODULES", ("json", "surely_absent"))
    monkeypatch.setattr(preflight, "_device", lambda: ["torch sees no CUDA device"])
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    assert preflight.missing() == [
        "no Python package surely_absent",
        "no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda",
        "torch sees no CUDA device",
    ]


def test_small_shapes_hold_every_op_to_the_budget(capsys):
    assert small_shapes.main(["--device", "cpu", "--backends", "reference"]) == 0
    printed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in printed.splitlines()] == [f"reference {op}" for op in small_shapes.OPS]
    assert "0 calls" not in printed


def test_small_shapes_fail_where_nothing_serves(capsys):
    assert small_shapes.main(["--device", "cpu", "--backends", "cuda"]) == 1
    assert "backend cuda serves nothing" in capsys.readouterr().err
