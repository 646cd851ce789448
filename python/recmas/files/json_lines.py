"""Files of JSON lines that a run appends to as it goes, and goes on with after it was cut short."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from recmas.files.reading import open_regular, parse_json
from recmas.files.writing import append

Entry = TypeVar("Entry")


class OtherRunError(ValueError):
    """A line of another run."""


def read_lines(path: Path, read: Callable[[dict[str, Any]], Entry], what: str, beginning: str) -> list[Entry]:
    """What earlier calls of the same run have written; a last line that was cut short is removed from the file.

    Args:
        path: it need not exist.
        read: makes an entry of a line's object; ValueError, KeyError or TypeError says that it is none, `OtherRunError`
            that it is of another run.
        what: a line is, for messages: "a record of an evaluation".
        beginning: of every line that is one.

    Raises:
        ValueError: a line that is none, or of another run; names file and line. The file stays as it is.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        *lines, cut = file.read().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(read(parse_json(line.decode())))
        except OtherRunError:
            raise ValueError(
                f"{path}, line {number}: of another system, other settings or other rows; use another file"
            ) from None
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not {what}") from None
    if cut:
        start = beginning.encode()
        if not (cut.startswith(start) or start.startswith(cut)):
            raise ValueError(f"{path}, line {len(lines) + 1}: not {what}")
        os.truncate(path, path.stat().st_size - len(cut))
    return entries


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write objects behind those that are there, a line each, to the disk itself."""
    append(path, to_lines(entries))


def to_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Objects as JSON, a line each."""
    return "".join(map(_line, entries))


def _line(entry: Mapping[str, Any]) -> str:
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write in ASCII alone
        return json.dumps(entry) + "\n"
    return line
