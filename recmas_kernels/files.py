"""Files that are replaced whole or not at all, and that are regular files before they are read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def check_regular(path: Path) -> int:
    """Bytes of a regular file; nothing is opened, so no FIFO is waited for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a folder, FIFO, socket or device.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    return status.st_size


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole: a temporary file beside it, fsync, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
