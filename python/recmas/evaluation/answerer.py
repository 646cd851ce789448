"""`Answerer`: what an evaluation asks of a system, wherever its agents are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from recmas.answering.answers import Answers, RowsFailedError, without_answer
from recmas.answering.options import AnswerOptions
from recmas.config.outline import Outline
from recmas.config.pattern import Pattern
from recmas.config.system_json import Defaults
from recmas.prompts.rows import Fields


class Answerer(Protocol):
    """A `RecursiveMAS`, or one whose agents are in other processes (`recmas.distributed`)."""

    pattern: Pattern
    defaults: Defaults

    @property
    def outline(self) -> Outline:
        """The system without its models."""

    def steps_by_role(self, asked: int | Mapping[str, int] | None) -> dict[str, int]:
        """Latent steps of every agent."""

    def fingerprint(self) -> str:
        """What decides its answers."""

    def check(self, rows: Sequence[Fields], options: AnswerOptions) -> None:
        """Raise what `answer` would raise before any model runs."""

    def answer(self, rows: Sequence[Fields], options: AnswerOptions) -> Answers:
        """Answers in the order of the rows."""


@contextmanager
def numbered(numbers: Sequence[int], rows: int) -> Iterator[None]:
    """Within, some of so many rows are asked; those that have no answer are named by their numbers among all.

    Raises:
        ValueError: rows without an answer.
    """
    try:
        yield
    except RowsFailedError as error:
        failed = {numbers[row]: why for row, why in error.failed.items()}
        raise ValueError(without_answer(failed, rows)) from error
