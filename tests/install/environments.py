"""Installations in throw-away environments: a copy of the sources, and interpreters that borrow this one's packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RELEASED_FOLDERS = ("csrc", "recmas_kernels", "python")
NOWHERE = "/nonexistent"
NO_COMPILER = {"CXX": NOWHERE}
NO_NVCC = {"CUDACXX": NOWHERE}


@dataclass
class Outcome:
    returncode: int
    output: str


def run(command: list[str | Path], folder: Path, variables: dict[str, str]) -> Outcome:
    """Run ``command`` with ``folder`` as working directory and none of this shell's own build settings.

    pip compiles no modules: for the build alone it would be those of four tools, each time.
    """
    unwanted = ("RECMAS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=kept | {"PIP_NO_COMPILE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Outcome(done.returncode, done.stdout)


class Environment:
    """An empty environment that imports torch and the build tools from the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "environment"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        venv.create(self.folder, with_pip=False)
        self.python = self.folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        borrowed = self.folder / "lib" / version / "site-packages" / "borrowed.pth"
        borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    def pip_install(self, *arguments: str | Path, **variables: str) -> Outcome:
        """``pip install`` without dependencies, with this Python's build requirements."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--ignore-installed"]
        return run([*command, "--no-build-isolation", *arguments], self.elsewhere, variables)

    def run(self, *arguments: str) -> Outcome:
        """The environment's Python on ``arguments``, outside the repository, whose folder would shadow the package."""
        return run([self.python, *arguments], self.elsewhere, {"OMP_NUM_THREADS": "1"})

    def info(self) -> dict:
        """What ``python -m recmas_kernels.info --json`` says."""
        outcome = self.run("-m", "recmas_kernels.info", "--json")
        assert outcome.returncode == 0, outcome.output
        return json.loads(outcome.output)


def quick_compiler(folder: Path) -> dict[str, str]:
    """The variable for a compiler which optimises nothing, and ends at the first error: a tenth of the time."""
    program = folder / "quick-c++"
    program.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0 -Wfatal-errors\n', encoding="utf-8")
    program.chmod(0o755)
    return {"CXX": str(program)}


def copy_sources(target: Path) -> Path:
    """Copies what a release contains, with nothing that was built."""
    target.mkdir(parents=True)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in RELEASED_FOLDERS:
        shutil.copytree(REPOSITORY / name, target / name, ignore=built)
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy2(file, target)
    return target
