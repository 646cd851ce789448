"""One writer per output: a second process that would write to the same place is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def one_writer(output: Path) -> Iterator[None]:
    """Within, this process alone writes to `output`; its own calls nest.

    The lock is a file: ``.lock`` in an output that is a folder, ``.NAME.lock`` beside one that is not; folders above it
    are made. The operating system releases it when the process ends, however that comes about.

    Raises:
        ValueError: another process, or another thread, is writing there.
        OSError: the place cannot be written to.
    """
    path = output / LOCK if output.is_dir() else output.parent / f".{output.name}{LOCK}"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{output}: another process is writing there; wait for it, or choose another place") from None
    try:
        yield
    finally:
        lock.release()
