"""`Answerer`: what an evaluation asks of a system, wherever its agents are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from recmas.answering.answers import Answers
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
