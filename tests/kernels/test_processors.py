"""The kernel tests on processors that this one can imitate: torch and its libraries limited to older instruction sets.

Each run takes every instruction set of our own kernels in turn, so that all pairs are met.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "test_cpu_link.py::test_error_budget_on_every_instruction_set",
    "test_cpu_link.py::test_several_blocks_of_tokens",
    "test_cpu_link.py::test_masters_in_float32_under_autocast",
    "test_alignment.py::test_loss_and_gradient_stay_in_the_error_budget",
    "test_handoff.py",
    "test_fuzz.py::test_random_calls_agree_with_float64_or_are_refused",
)
LIMITS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
RUN = """
import sys, pytest, torch
found = torch.backends.cpu.get_cpu_capability().lower()
assert found == sys.argv[1], f"torch uses {found}"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_beside_an_older_torch(capability, tmp_path):
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("this processor has no AVX2")
    # A cache of its own: torch would find again, without the limits, what it compiled under them, and abort.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, **LIMITS[capability], **cache, "RECMAS_FUZZ_CALLS": "200"}
    tests = [str(ROOT / "tests" / "kernels" / test) for test in TESTS]
    done = subprocess.run(
        [sys.executable, "-c", RUN, capability, *tests], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout[-2000:]
