"""Hostile folders: each is refused in one line, with exit status 2, in little time and memory, and changes nothing."""

from __future__ import annotations

import shutil

import pytest

from tests.runtime.commands import recmas
from tests.runtime.lean import write_lean
from tests.torture.amounts import some
from tests.torture.hostile import HOSTILE

SECONDS, MEMORY = 5, 1 << 30
RUN = ("run", "system", "--questions", "rows.jsonl", "--max-new-tokens", "1", "--output", "answers.jsonl")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_lean(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", some(list(HOSTILE)))
def test_it_is_refused(good, tmp_path, name, record_property):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    HOSTILE[name](tmp_path / "system")
    ended = recmas(tmp_path, *RUN)
    found = f"{ended.seconds:.1f} s, {ended.peak >> 20} MiB: {ended.err.strip()}"
    record_property("torture", (name[:44], 1, found.replace(str(tmp_path), "")[:110]))
    assert (ended.status, ended.out) == (2, ""), found
    assert ended.err.startswith("recmas: error: "), found
    assert ended.err.count("\n") == 1, found
    assert ended.err[:-1].isprintable(), found
    assert len(ended.err) < 1000, found
    assert ended.seconds <= SECONDS, found
    assert ended.peak <= MEMORY, found
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("name", some([name for name in HOSTILE if not name.startswith("chat")]))
def test_its_memory_is_not_estimated(good, tmp_path, name):
    """`recmas info` loads no model, and is told the same lies; what it has no use for it need not refuse."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    HOSTILE[name](tmp_path / "system")
    ended = recmas(tmp_path, "info", "system")
    found = f"{ended.seconds:.1f} s, {ended.peak >> 20} MiB: {ended.err.strip()}"
    assert ended.status in (0, 2), found
    assert ended.err.count("\n") == (ended.status == 2), found
    assert ended.seconds <= SECONDS, found
    assert ended.peak <= MEMORY, found
