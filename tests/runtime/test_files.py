"""Files are replaced whole or not at all, and are on the disk before they are in place."""

from __future__ import annotations

import os
import stat

import pytest

from recmas.files import replacing, replacing_folder, write_atomically
from recmas.files.writing import append


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


@pytest.fixture
def umask():
    """027 for the time of a test."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_permissions_are_those_that_were_there_or_that_the_process_gives(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_atomically(path, "new")
    assert mode(path) == 0o640
    path.chmod(0o604)
    write_atomically(path, "newer")
    assert mode(path) == 0o604
    with replacing_folder(tmp_path / "system") as fresh:
        (fresh / "system.json").write_text("{}")
    assert mode(tmp_path / "system") == 0o750


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    for text in ("new", "newer"):
        write_atomically(tmp_path / "link", text)
        assert (tmp_path / "elsewhere").read_text() == text
        assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("write", [write_atomically, append])
@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device"])
def test_what_is_no_regular_file_is_left_alone(tmp_path, write, kind):
    path = tmp_path / "output"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(os.devnull)
    before = path.stat()
    with pytest.raises(ValueError, match=f"is {kind}, expected a regular file"):
        write(path, "text")
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert [left.name for left in tmp_path.iterdir()] == ["output"]
