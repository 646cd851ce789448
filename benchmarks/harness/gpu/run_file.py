"""A session's results: the run file that ``python -m benchmarks.report`` reads, replaced whole after every cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recmas.files import write_atomically

_CELL = ("suite", "op", "shape", "dtype", "pass", "tokens", "cache", "graph")


class RunFile:
    """Records of cells, answers to questions, and what was left out.

    Args:
        path: where to write; None keeps everything in memory.
        head: makes the file's "recmas" part (`harness.gpu.session`), anew each time.
    """

    def __init__(self, path: Path | None, head: Callable[[], dict[str, Any]]) -> None:
        self._path, self._head = path, head
        self.records: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.not_run: dict[str, str] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Keep ``record`` in the place of one of the same cell that was measured before, with fewer peers."""
        for index, other in enumerate(self.records):
            if _cell(other) == _cell(record):
                self.records[index] = record
                break
        else:
            self.records.append(record)
        self.save()

    def answer(self, question: str, what: str, **values: Any) -> None:
        """Keep what was measured to answer ``question``, for the case ``what``."""
        self.answers.append({"question": question, "what": what, **values})
        self.save()

    def leave_out(self, cell: str, reason: str) -> None:
        self.not_run[cell] = reason
        self.save()

    def save(self) -> None:
        """Write the file; until the first call there is none."""
        if self._path is None:
            return
        head = self._head() | {"answers": self.answers, "not_run": self.not_run}
        benchmarks = [{"extra_info": {"record": record}} for record in self.records]
        write_atomically(self._path, json.dumps({"recmas": head, "benchmarks": benchmarks}) + "\n")


def _cell(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in _CELL)
