"""Files and folders that are replaced whole or not at all.

What is new is written beside its place under a temporary name, synced, and renamed. Its writer holds a lock on it, so
the next writer can distinguish what a killed process left behind, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recmas.files.reading import check_output

_RANDOM = r"[a-z0-9_]{8}"  # as `tempfile` draws it
_UMASK = threading.Lock()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, open for binary writing, that takes `path`'s place when the block ends without an exception.

    A reader sees the old file or the new one, whole; the new one is on the disk before it takes the place. Where `path`
    is a symbolic link, the file that it leads to is replaced. Permissions are those of the file that was there, and of
    a new one those that the process gives its files (umask).

    Raises:
        ValueError: something stands at `path` that is no regular file.
        OSError: the disk is full, and so on; names `path`.
    """
    place = Path(os.path.realpath(path))
    check_output(place)
    with naming(path):
        sweep(place)
        handle, name = _claimed(place, folder=False)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(handle)
                os.chmod(name, stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o666 & ~_umask())
                os.replace(name, place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(place.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes `path`'s place, where nothing or an empty folder may stand, when the block ends well.

    Raises:
        ValueError: something else stands there when the block ends.
        OSError: as for `replacing`.
    """
    place = Path(os.path.abspath(path))
    with naming(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place)
        handle, name = _claimed(place, folder=True)
        try:
            yield Path(name)
            sync_tree(Path(name))
            os.chmod(name, 0o777 & ~_umask())
            os.rename(name, place)
        except BaseException as error:
            shutil.rmtree(name, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise ValueError(f"{path}: exists already; nothing was written") from None
            raise
        finally:
            os.close(handle)
        sync(place.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def append(path: Path, text: str) -> None:
    """Write `text`, UTF-8, behind what `path` holds, to the disk itself; makes the file and the folders above it.

    Raises:
        ValueError: something stands at `path` that is no regular file.
        OSError: the disk is full, and so on; names `path`.
    """
    check_output(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def sweep(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{_RANDOM}")
    for left in path.parent.iterdir():
        if not name.fullmatch(left.name) or left.is_symlink() or not (left.is_file() or left.is_dir()):
            continue
        try:
            handle = os.open(left, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # gone meanwhile, or of another user
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its writer is alive
            pass
        else:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all that it holds."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError that names no file (a write to a full disk does not) becomes one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _claimed(place: Path, folder: bool) -> tuple[int, str]:
    """A new temporary file or folder beside `place`: its descriptor, by which it is locked, and its name."""
    prefix = f".{place.name}."
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=prefix, dir=place.parent)
            handle = os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, dir=place.parent)
        with suppress(OSError):  # a file system without locks; nothing is swept there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):  # else a sweeper came between
            return handle, name
        os.close(handle)
