"""Every Triton kernel in Triton's CPU interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent


def major_and_minor(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    major_and_minor(triton) < (3, 7) and major_and_minor(numpy) >= (2, 4),
    reason="the interpreter of this Triton cannot turn its scalars into indices under numpy 2.4",
)
def test_kernels_in_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr]
    print(summary[0])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    passed = re.search(r"(\d+) passed", summary[0])
    assert passed is not None, summary[0]
    assert int(passed.group(1)) > 0
    assert "skipped" not in summary[0], summary[0]
