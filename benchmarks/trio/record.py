"""The JSON file of all that was measured: a part per ordered pair of models, an entry per step's finding."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import git_commit, origin
from recmas.files import write_atomically

EMPTY: dict[str, Any] = {"sha256": {}, "links": [], "audit": [], "time": []}


def read(path: Path) -> dict[str, Any]:
    """The whole record; empty where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def part(record: dict[str, Any], pair: str) -> dict[str, Any]:
    """What the record holds of a pair, all that is missing as empty."""
    return {key: record.get(pair, {}).get(key, type(value)()) for key, value in EMPTY.items()}


def change(path: Path, pair: str, made: Callable[[dict[str, Any]], None]) -> None:
    """Read the file anew, let ``made`` change the pair's part, and write it, one process after the other."""
    with _alone(path.parent):
        record = read(path)
        mine = part(record, pair)
        made(mine)
        text = json.dumps(record | {pair: mine, "made": origin()}, indent=1)
        lines = re.sub(
            r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text
        )  # a line per list of numbers
        write_atomically(path, lines + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process or thread is within, for this folder."""
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)  # gives the lock back


def commit() -> str:
    """The commit that an entry was made with; a plus says that the tree had changes beside it."""
    found = git_commit()
    return found["commit"][:9] + ("+" if found["dirty"] else "")
