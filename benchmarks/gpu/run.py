"""``make gpu``, or ``python -m benchmarks.gpu.run [DIR]``: all that needs a CUDA device, answers in order of worth.

Each step has its seconds and leaves its log, and its outcome stands in DIR/record.md before the next one begins, so
that whatever ends the run leaves what is known. A step that takes too long is interrupted, as by Ctrl-C, so that pytest
still says what failed; what it did not reach is named. Where a result is wrong (build, tests, repeated calls), the run
ends: nothing that follows would mean anything, and a second run fits into the time. Tests that were interrupted before
one of them failed end nothing. Nothing is fetched or installed. DIR/all.tar.gz holds the record, logs and results so
far, for machines that give few files back.

Exit code: 0 if every step passed, 1 if one failed or was not reached, 2 if nothing can run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.gpu import preflight

ARCHIVE = "all.tar.gz"
ROOT = Path(__file__).resolve().parents[2]
GRACE = 10  # seconds between an interrupt and a kill
# Else every test of the CUDA kernels would be skipped, and what is timed would be another backend's.
USABLE = "$PYTHON -c 'import sys; from recmas_kernels.backends import cuda; sys.exit(cuda.unavailable())'"
KERNELS = "regex:link_product|link_rows|_normalise|_forward|_align"


@dataclass(frozen=True)
class Step:
    """A step of the run.

    Attributes:
        name: of its log.
        seconds: that it may take.
        commands: lines for the shell, all of which run.
        decides: whether the run ends if this fails.
    """

    name: str
    seconds: int
    commands: tuple[str, ...]
    decides: bool = False


def _bench(step: str, seconds: int) -> str:
    """The cells of a step; those for which too little time is left are named in its file."""
    return (
        f"$PYTHON -m pytest benchmarks/suites/gpu -q -p no:cacheprovider -p no:benchmark --grid full --step {step} "
        f"--seconds {seconds - 5} --records $OUT/{step}.json"
    )


_TESTS = "$PYTHON -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors $LIMIT"
_SHAPES = "-m benchmarks.harness.gpu.small_shapes"
_SANITIZED = "$SANITIZER --target-processes application-only --error-exitcode 9 --print-limit 20 --tool"
PLAN = (
    Step(
        "build",
        40,
        (
            "RECMAS_CUDA_ARCHS=native $PYTHON setup.py build_ext --inplace --parallel 3",
            "$PYTHON -m recmas_kernels.info",
            USABLE,
        ),
        decides=True,
    ),
    Step(
        "tests",
        60,
        (f"{_TESTS} $WORKERS -k 'not memory and not gibibytes' $FILES", f"{_TESTS} -k 'memory or gibibytes' $FILES"),
        decides=True,
    ),
    Step("repeat", 20, ("$PYTHON -m benchmarks.gpu.repeat",), decides=True),
    Step("few", 85, (_bench("few", 85),)),
    Step("many", 75, (_bench("many", 75),)),
    Step("steps", 70, (_bench("steps", 70),)),
    Step("compile", 110, (_bench("compile", 110),)),
    Step(
        "sanitize",
        50,
        (
            f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {_SANITIZED} memcheck $PYTHON {_SHAPES} --backends cuda",
            f"{_SANITIZED} racecheck $PYTHON {_SHAPES} --backends cuda",
        ),
    ),
    Step("profile", 20, (f"$NCU --target-processes all --kernel-name '{KERNELS}' --launch-count 8 $PYTHON {_SHAPES}",)),
    Step("candidates", 35, (_bench("candidates", 35),)),
    Step("tables", 5, ("$PYTHON -m benchmarks.report.gpu_tables $OUT/*.json >> $OUT/record.md",)),
)


def outcome(status: int, taken: float, last: str) -> str:
    """How a step ended, in a line."""
    if status == 0:
        return f"passed in {taken:.0f} s: {last}"
    if status in (124, 137):
        return f"INTERRUPTED after {taken:.0f} s, which is its limit: {last}"
    return f"FAILED (exit {status}) after {taken:.0f} s: {last}"


def wrong(status: int, last: str) -> bool:
    """Whether a step that decides has shown a wrong result; `last` is the last line of its log."""
    passed_so_far = re.search(r"\d+ passed", last) and not re.search(r"\d+ (failed|error)", last)
    return status != 0 and not (status == 124 and passed_so_far)


def environment(folder: Path) -> dict[str, str]:
    """What the commands of the plan name."""
    python = sys.executable
    files = subprocess.run(
        ["grep", "-rlE", "--include=test_*.py", "mark\\.gpu", "tests"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    workers = f"-n {min(8, os.cpu_count() or 1)}" if importlib.util.find_spec("xdist") else ""
    limit = "--timeout 30" if importlib.util.find_spec("pytest_timeout") else ""
    return {
        **os.environ,
        "PYTHON": python,
        "OUT": str(folder),
        "FILES": " ".join(sorted(files)),
        "WORKERS": workers,
        "LIMIT": limit,
        "SANITIZER": preflight.tool("compute-sanitizer") or "",
        "NCU": preflight.tool("ncu") or "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }


def script(step: Step) -> str:
    """The step's commands as one shell program; its status is that of the first that failed.

    Pytest survives an interrupt, as it should; without the trap the shell would then begin the next command.
    """
    lines = [f"{command} || {{ code=$?; [ $status -ne 0 ] || status=$code; }}" for command in step.commands]
    return "\n".join(["trap 'exit 130' INT", "status=0", *lines, "exit $status"])


def run(
    folder: Path,
    plan: Sequence[Step] = PLAN,
    names: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run the plan; DIR/record.md grows by a line for each step, and DIR/all.tar.gz by what it left."""
    folder.mkdir(parents=True, exist_ok=True)
    record, failed = folder / "record.md", False
    files = [record, *(folder / f"{step.name}{end}" for step in plan for end in (".log", ".json"))]
    for old in (*files, folder / ARCHIVE):
        old.unlink(missing_ok=True)
    given = environment(folder) if names is None else names

    def note(line: str) -> None:
        with record.open("a") as out:
            out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())
        _pack(folder, files)
        say(line)

    note(f"# What ran, of {sum(step.seconds for step in plan)} s\n")
    for place, step in enumerate(plan):
        missing = next((name for name in ("SANITIZER", "NCU") if f"${name}" in script(step) and not given[name]), None)
        if missing is not None:
            note(f"- {step.name}: skipped: no {missing.lower()} in CUDA_HOME, PATH or /usr/local/cuda")
            continue
        log, begun = folder / f"{step.name}.log", time.monotonic()
        with log.open("w") as out:
            limited = [
                "timeout",
                "--signal=INT",
                f"--kill-after={GRACE}",
                str(step.seconds),
                "bash",
                "-c",
                script(step),
            ]
            status = subprocess.run(limited, cwd=ROOT, env=given, stdout=out, stderr=subprocess.STDOUT).returncode
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1][:160] if lines else "no output"
        note(f"- {step.name}: {outcome(status, time.monotonic() - begun, last)}")
        failed = failed or status != 0
        if step.decides and wrong(status, last):
            rest = ", ".join(later.name for later in plan[place + 1 :])
            note(f"\nThe run ends here: what follows would mean nothing. Not reached: {rest or 'nothing'}.")
            break
    return 1 if failed else 0


def _pack(folder: Path, files: Sequence[Path]) -> None:
    """Replace the archive by one of the files that are there; whatever ends the run leaves the old one or the new."""
    part = folder / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as archive:
        for file in filter(Path.exists, files):
            archive.add(file, file.name)
    part.replace(folder / ARCHIVE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="build/gpu", metavar="DIR")
    parser.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    if options.plan:
        for step in PLAN:
            print(f"{step.seconds:4} s  {step.name}{'  (ends the run if it fails)' if step.decides else ''}")
        print(f"{sum(step.seconds for step in PLAN):4} s  in all")
        return 0
    if found := preflight.missing():
        print(f"make gpu cannot run with {sys.executable}: {'; '.join(found)}", file=sys.stderr)
        return 2
    if shutil.which("timeout") is None:
        print("make gpu cannot run: no timeout (coreutils)", file=sys.stderr)
        return 2
    return run(Path(options.folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
