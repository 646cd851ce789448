"""Files are replaced whole or not at all, and are on the disk before they are in place."""

from __future__ import annotations

import os
import stat

import pytest

from recmas.files import replacing, write_atomically


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "system.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def write():
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError("cannot be stored")

    with pytest.raises(RuntimeError, match="cannot be stored"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_it_is_in_place_and_its_folder_after(tmp_path, monkeypatch):
    path, steps = tmp_path / "links.json", []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source, target):
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(path, "ünïcode\n")
    assert steps == ["file", "replace", "folder"]
    assert path.read_text(encoding="utf-8") == "ünïcode\n"
