"""Files as data that nobody vouches for: regular, inside their folder, of bounded size, and JSON that is JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import IO, Any, NoReturn

LARGEST_JSON = 16 << 20
"""Bytes of a file of settings."""
OUTSIDE = "if you trust that, allow it with --allow-outside (allow_outside=True)"
"""Follows what `inside` says of a system's part."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path, found: os.stat_result | None = None) -> os.stat_result:
    """The status of a regular file, or of the one that a link leads to; nothing is opened.

    Raises:
        OSError: there is none, and so on.
        ValueError: it is a folder, FIFO, socket or device.
    """
    status = os.stat(path) if found is None else found
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: is {_KINDS.get(stat.S_IFMT(status.st_mode), 'special')}, expected a regular file")
    return status


def check_output(path: Path) -> None:
    """Raise ValueError if something stands at `path` that is no regular file."""
    if path.exists():
        check_regular(path)


def open_regular(path: Path, largest: int | None = None) -> IO[bytes]:
    """A regular file, open for binary reading; never waits for the other end of a FIFO.

    Raises:
        OSError: as for `open`.
        ValueError: no regular file, or one of more than `largest` bytes.
    """
    check_regular(path)  # before it is opened: to open a device may do something
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = check_regular(path, os.fstat(handle)).st_size
        if largest is not None and size > largest:
            raise ValueError(f"{path}: {size} bytes are too many, at most {largest} are read")
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_json(path: Path, largest: int = LARGEST_JSON, *, strict: bool = True) -> Any:
    """The value in a JSON file of at most `largest` bytes; `strict` as for `parse_json`.

    Raises:
        OSError: as for `open`.
        ValueError: no regular file, too large, not UTF-8, or not JSON; one line that names it.
    """
    with open_regular(path, largest) as file:
        content = file.read()
    try:
        return parse_json(content.decode("utf-8-sig"), strict=strict)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def parse_json(text: str, *, strict: bool = True) -> Any:
    """`json.loads` whose every failure is a ValueError of one line.

    Args:
        text: JSON.
        strict: refuse NaN and infinite numbers, too, which are not JSON, and names that occur twice in an object;
            configurations of models hold some.
    """
    try:
        if not strict:
            return json.loads(text)
        return json.loads(text, parse_constant=_not_json, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def inside(folder: Path, name: str, key: str) -> Path:
    """The file or folder `name` of `folder`, all links followed.

    Args:
        folder: of a system, a model or a run; where the hub's cache keeps it, its blobs count as inside.
        name: relative to it.
        key: begins the message.

    Raises:
        ValueError: an absolute path, or one that leads out of the folder, by ``..`` or by a link.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{key}: {name} leads out of {folder}")
    place, root = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(place.is_relative_to(home) for home in homes):
        raise ValueError(f"{key}: {name} leads out of {folder} by a symbolic link")
    return place


def shown(value: object) -> str:
    """A value as an error message quotes it: short, however long or deep it is."""
    return _SHORT.repr(value)


def sha256(path: Path) -> str:
    """Of a regular file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} occurs twice in one object")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
