"""Compiled modules are loaded if they were built from the sources beside them, and refused otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recmas_kernels import sources
from recmas_kernels.backends import cpu, native

ROOT = Path(sources.__file__).parent.parent
compiled = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@compiled
def test_a_module_of_other_sources_is_refused(monkeypatch):
    assert native.load("cpu").sources == sources.digest("cpu")
    monkeypatch.setattr(sources, "digest", lambda label: "another")
    with (
        pytest.warns(RuntimeWarning, match="rebuild"),
        pytest.raises(ImportError, match="other sources.*rebuild it with"),
    ):
        native.load("cpu")
    monkeypatch.setattr(sources, "digest", lambda label: None)  # an installed copy
    native.load("cpu")


@compiled
def test_info_and_a_backend_asked_for_by_name_say_what_to_do(tmp_path):
    for folder in ("recmas_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "csrc" / "link.h").open("a") as header:
        header.write("// changed\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}

    def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True)

    page = python("-m", "recmas_kernels.info").stdout
    assert "_cpu: " in page
    assert "rebuild it with python setup.py build_ext --inplace" in page
    call = "import torch, recmas_kernels as r; r.FusedRecursiveLink.inner(8)(torch.zeros(1, 8))"
    assert python("-c", call).returncode == 0, "auto serves by the reference"
    refused = python("-c", call, RECMAS_BACKEND="cpu")
    assert "BackendUnavailableError" in refused.stderr
    assert "rebuild it with" in refused.stderr
