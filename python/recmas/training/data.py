"""Training rows and the batches made of them.

A row is a JSON object: the fields that the agents' templates name, and what each agent should say::

    {"question": "2 bako", "planner_sheet": "...",
     "targets": {"planner": "1 red", "critic": ["1 cat", "0 cat"], "solver": ["1 dilo", "0 dilo"]}}

A target is one text, said in every round, or one text per round. The stages that align links take any text as well,
for every agent the same: ``{"text": "...", "prompt": "..."}``, the prompt optional.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Union

from recmas.config.pattern import Visit
from recmas.prompts.jsonl import read_rows
from recmas.prompts.rows import Fields, readable
from recmas.prompts.source import read_source, with_columns
from recmas.prompts.targets import check_target, target_text
from recmas.system.system import System

RowSource = Union[str, "os.PathLike[str]", Sequence[Fields], Callable[[int], Sequence[Fields]]]


class DataSource:
    """Batches of rows as a pure function of ``(seed, index)``, so that a run resumes exactly where it stopped.

    ``rows`` is a JSONL path, a sequence of rows (shuffled anew in every epoch) or a callable ``index -> rows`` that
    makes the batch itself (generated worlds; it decides the batch's size and must return the same rows for the same
    index).
    """

    def __init__(self, rows: RowSource, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._make: Callable[[int], Sequence[Fields]]
        self._rows: Sequence[Fields] = ()
        if callable(rows):
            self._make = rows
            return
        self._rows = read_rows(rows) if isinstance(rows, str | os.PathLike) else rows
        if not self._rows:
            raise ValueError("rows: expected at least one row, got an empty sequence")
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._make = self._shuffled

    def check_targets(self, needed: Iterable[tuple[str, int]]) -> None:
        """Look at all rows, so that one without a text ends no run halfway; those of a callable are not known yet.

        Args:
            needed: (role, round) of the texts that every row must have.

        Raises:
            ValueError: a row lacks one, as `target_texts` says it, or has an empty one; its number counts from 0 over
                all rows.
        """
        for role, round in needed:
            for index, row in enumerate(self._rows):
                check_target(row, index, role, round)

    def check_fields(self, system: System, visits: Iterable[Visit]) -> None:
        """Raise ValueError, as `System.check_fields`, if a row lacks a field that a prompt of these visits names."""
        system.check_fields(self._rows, visits)

    @property
    def rows(self) -> Sequence[Fields]:
        """All rows; none of a callable, whose rows are not known yet."""
        return self._rows

    def named_batch(self, index: int) -> list[tuple[Hashable, Fields]]:
        """The rows of batch ``index``, each with what distinguishes it from all others of the run."""
        rows = self.batch(index)
        if not self._rows:
            return [((index, place), row) for place, row in enumerate(rows)]
        first = index * self._batch_size
        return [(self._position(first + place), row) for place, row in enumerate(rows)]

    def batch(self, index: int) -> list[Fields]:
        """The rows of batch ``index`` (from 0)."""
        rows = list(self._make(index))
        if not rows:
            raise ValueError(f"rows: the callable returned no rows for batch {index}")
        return rows

    def _shuffled(self, index: int) -> list[Fields]:
        first = index * self._batch_size
        return [self._rows[self._position(i)] for i in range(first, first + self._batch_size)]

    def _position(self, i: int) -> int:
        epoch, offset = divmod(i, len(self._rows))
        if self._order[0] != epoch:
            order = list(range(len(self._rows)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


def fixed_batches(rows: RowSource, size: int) -> list[Sequence[Fields]]:
    """All rows in their order, so many at a time, for measuring.

    Raises:
        ValueError: no rows, or a callable, whose rows have no end.
    """
    if callable(rows):
        raise ValueError("validation: expected a JSONL path or a sequence of rows, got a callable")
    made = read_rows(rows) if isinstance(rows, str | os.PathLike) else rows
    if not made:
        raise ValueError("validation: expected at least one row, got an empty sequence")
    return [made[first : first + size] for first in range(0, len(made), size)]


def pick(seed: int, step: int, choices: int | Sequence[int]) -> int:
    """One of ``choices`` for this step, a pure function of ``(seed, step)``; an int stands for itself."""
    return choices if isinstance(choices, int) else random.Random(f"{seed}:{step}").choice(list(choices))


def target_texts(rows: Sequence[Fields], role: str, round: int) -> list[str]:
    """What agent ``role`` should say in ``round`` (from 1), one text per row.

    Raises:
        ValueError: a row has no text for this agent and round; names the row, the agent and what was found.
    """
    return [target_text(row, index, role, round) for index, row in enumerate(rows)]


def read_texts(
    source: str, *, split: str = "train", subset: str | None = None, columns: Mapping[str, str] | None = None
) -> list[dict[str, object]]:
    """Any texts as rows, from a file or a data set on the hub (`recmas.prompts.source.read_source`).

    Of each row, "text" and "prompt" are taken; ``columns`` says which columns these are, ``{"text": "content"}``.

    Raises:
        ValueError: as `read_source`, or a row without a text or with a prompt that is none; names the row.
        FileNotFoundError, ImportError: as `read_source`.
    """
    rows = []
    for index, row in enumerate(with_columns(read_source(source, split, subset), columns or {}, source)):
        if "text" not in row:
            raise ValueError(f"{source}: row {index}: no field 'text'; it has {', '.join(sorted(row)) or 'none'}")
        text = {key: row[key] for key in ("text", "prompt") if row.get(key) is not None}
        check_plain(text, index)
        rows.append(text)
    return rows


def is_plain(row: Fields) -> bool:
    """Whether a row is any text rather than a task's messages."""
    return "text" in row and "targets" not in row


def check_plain(row: Fields, index: int) -> str:
    """The text of a row that is any text.

    Raises:
        ValueError: text or prompt is no text, or an empty one; names the row.
    """
    for key in ("prompt", "text"):
        value = row.get(key, "absent")
        if not isinstance(value, str) or not value:
            raise ValueError(f"row {index}: expected {key!r} to be a text that is not empty, got {value!r}")
        readable(value, f"row {index}: {key!r}")
    return str(row["text"])
