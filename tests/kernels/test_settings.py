"""The ``RECMAS_*`` variables: what absent, empty and given ones mean, and that nothing else reads the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import recmas_kernels
from recmas_kernels.backends import settings

READERS = {
    "RECMAS_BACKEND": settings.backend,
    "RECMAS_CPU_ISA": settings.cpu_isa,
    "RECMAS_CHECK": settings.checks,
}


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("variable", READERS)
def test_absent_and_empty_variables_are_alike(variable, empty, monkeypatch):
    monkeypatch.setenv(variable, "") if empty else monkeypatch.delenv(variable, raising=False)
    assert not READERS[variable]()


def test_names_are_returned_and_switches_are_on_at_1_only(monkeypatch):
    for variable in READERS:
        monkeypatch.setenv(variable, "avx2")
    assert [read() for read in READERS.values()] == ["avx2", "avx2", False]
    for variable in READERS:
        monkeypatch.setenv(variable, "1")
    assert [read() for read in READERS.values()] == ["1", "1", True]


def test_another_mapping_as_the_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RECMAS_BACKEND": "triton"})
    assert settings.backend() == "triton"
    assert settings.cpu_isa() is None


def test_nothing_else_reads_the_environment():
    package = Path(recmas_kernels.__file__).parent
    readers = [path for path in package.rglob("*.py") if re.search(r"\b(environ|getenv)\b", path.read_text())]
    assert {path.relative_to(package).as_posix() for path in readers} == {"backends/settings.py"}
