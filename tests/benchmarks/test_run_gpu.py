"""benchmarks/run_gpu.sh without a GPU: its refusals; with a stand-in for Python its phases, limits and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness.gpu import preflight, small_shapes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"

# Answers as the real one would, and says what it was asked; a phase named in FAIL fails, one in HANG never ends.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m benchmarks.harness.gpu.preflight") echo "$FAKE_SANITIZER"; exit 0 ;;
  "setup.py build_ext --inplace") phase=build ;;
  "-m recmas_kernels.info") echo info; exit 0 ;;
  "-c import xdist") exit 1 ;;
  "-m pytest -m gpu"*) phase=tests ;;
  "-m benchmarks.harness.gpu.small_shapes") phase=sanitize ;;
  "-m pytest benchmarks/suites/gpu"*)
    phase=bench
    echo '{}' >"${@: -1}" ;;
  "-m benchmarks.report.gpu_tables"*) echo "the table"; exit 0 ;;
  *) echo "not expected: $*"; exit 77 ;;
esac
echo "$phase: $*"
[[ " $HANG " == *" $phase "* ]] && sleep 600
[[ " $FAIL " == *" $phase "* ]] && exit 3
exit 0
"""
FAKE_SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $2, caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}"
while [[ $1 != *python* ]]; do shift; done
"$@"
"""


@pytest.fixture
def run_script(tmp_path: Path):
    for name, text in (("fake-python", FAKE_PYTHON), ("fake-sanitizer", FAKE_SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, sanitizer: bool = True, **variables: str) -> tuple[int, dict[str, str], str]:
        """Exit code, the files in the folder by name, and what was printed."""
        environment = {
            **os.environ,
            "PYTHON": str(tmp_path / "fake-python"),
            "FAKE_SANITIZER": str(tmp_path / "fake-sanitizer") if sanitizer else "",
            **variables,
        }
        folder = tmp_path / "a folder"
        done = subprocess.run(
            [SCRIPT, *arguments, folder], env=environment, capture_output=True, text=True, timeout=120
        )
        files = {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}
        return done.returncode, files, done.stdout + done.stderr

    return run


def test_every_phase_leaves_its_log(run_script):
    code, files, printed = run_script()
    assert code == 0, printed
    assert files.keys() == {"build.log", "tests.log", "sanitize.log", "bench.log", "bench.json", "summary.md"}
    assert "sanitizer memcheck, caching 1" in files["sanitize.log"]
    assert "sanitizer racecheck, caching 1" in files["sanitize.log"]
    assert "tests/kernels/triton/test_gpu.py" in files["tests.log"]
    assert "tests/runtime/test_files.py" not in files["tests.log"]
    assert "--grid full --seconds 5" in files["bench.log"]  # five hundred and some
    assert [line[: line.index(":")] for line in files["summary.md"].splitlines() if line.startswith("- ")] == [
        "- build",
        "- tests",
        "- sanitize",
        "- bench",
    ]
    assert files["summary.md"].endswith("the table\n")


@pytest.mark.parametrize("phase", ["build", "tests", "sanitize", "bench"])
def test_a_phase_that_fails_is_named_and_the_others_run(run_script, phase):
    code, files, _ = run_script(FAIL=phase)
    assert code == 1
    assert len(files) == 6
    verdicts = {line[2:].partition(":")[0]: line for line in files["summary.md"].splitlines() if line.startswith("- ")}
    assert "FAILED (exit 3)" in verdicts.pop(phase)
    assert all("passed" in verdict for verdict in verdicts.values())


def test_a_phase_that_hangs_is_stopped_and_what_was_measured_stays(run_script):
    code, files, _ = run_script("--seconds", "6", "--phases", "tests bench", HANG="bench")
    assert code == 1
    assert "bench: stopped after" in files["summary.md"]
    assert files.keys() == {"tests.log", "bench.log", "bench.json", "summary.md"}
    assert "--seconds 0" in files["bench.log"]


def test_a_phase_for_which_no_time_is_left_is_said(run_script):
    code, files, _ = run_script("--seconds", "2", "--phases", "tests bench", HANG="tests")
    assert code == 1
    assert "- tests: stopped after" in files["summary.md"]
    assert "- bench: not run: the time is spent" in files["summary.md"]


def test_an_absent_sanitizer_is_counted_as_skipped(run_script):
    code, files, _ = run_script(sanitizer=False)
    assert code == 0
    assert "- sanitize: skipped: no compute-sanitizer" in files["summary.md"]
    assert "sanitize.log" not in files


def test_results_of_an_earlier_run_do_not_stay(run_script, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "bench.json").write_text("old")
    (folder / "mine.txt").write_text("kept")
    _, files, _ = run_script("--phases", "build")
    assert files.keys() == {"mine.txt", "build.log", "summary.md"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "soon"], "--seconds is 'soon', expected a whole number"),
        (["--seconds"], "--seconds needs a value"),
        (["--phases", "build dance"], "no phase 'dance', expected build, tests, sanitize or bench"),
        (["--fast"], "unknown option --fast (--help lists them)"),
        (["one", "two"], "one folder, got one and two"),
    ],
)
def test_bad_arguments_give_one_line(tmp_path, arguments, message):
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_says_what_the_exit_codes_mean():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Exit code: 0 if every phase passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device it would run")
def test_without_a_device_one_line_says_so_and_nothing_is_written(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("run_gpu.sh cannot run with")
    assert "torch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_python_that_is_not_there(tmp_path):
    environment = {**os.environ, "PYTHON": "/nonexistent/python"}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "run_gpu.sh cannot run: no Python called /nonexistent/python\n"


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
