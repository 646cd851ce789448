"""What a run returns: answers, what each cost, and every handoff where a trace was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from recmas.engine.prefix_reuse import Reading
from recmas.tools import ToolCall


@dataclass
class Handoff:
    """What `target` read from `source` in `round`: latents ``[m, d_source]`` (through the inner link) or text."""

    round: int
    source: str
    target: str
    latents: Tensor | None = None
    text: str | None = None


@dataclass
class Answer:
    """The answer to one row.

    Attributes:
        text: what the last agent wrote, without special tokens; results of tools stand where it read them.
        tokens: its token ids, the end-of-text token and results of tools included.
        latent_steps: latent steps by role, over all rounds.
        text_tokens: tokens that each role wrote, over all rounds, the answer's included; results of tools are not.
        tool_calls: in order.
        handoffs: every handoff, where a trace was asked for.
        rounds: how many it took; 0 before there is an answer.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    latent_steps: dict[str, int] = field(default_factory=dict)
    text_tokens: dict[str, int] = field(default_factory=dict)
    tool_calls: list[ToolCall] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    rounds: int = 0


class Answers(list[Answer]):
    """Answers in the order of the rows.

    Attributes:
        seconds: time of each stage by "round R, ROLE", over all batches.
        reading: how the prompts of each stage were read, by the same names.
    """

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        super().__init__(answers)
        self.seconds: dict[str, float] = {}
        self.reading: dict[str, Reading] = {}

    def fill(self, part: Answers, numbers: Sequence[int]) -> None:
        """Put the answers of one batch in the places of its rows, and add its seconds and readings to the others'."""
        for number, answer in zip(numbers, part, strict=True):
            self[number] = answer
        for stage, seconds in part.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for stage, reading in part.reading.items():
            self.reading.setdefault(stage, Reading()).add(reading)


class RowError(ValueError):
    """A row itself, nobody else, is why it is not answered: texts that it was sent exceed a context."""


class RowsFailedError(ValueError):
    """Some rows have no answer; the others do, unless one failed when `on_text` had been shown text of its batch.

    Attributes:
        answers: of all rows; those of rows that failed, were left out, or were still to come, are empty.
        failed: why, by row.
    """

    def __init__(self, answers: Answers, failed: Mapping[int, Exception]) -> None:
        super().__init__(without_answer(failed, len(answers)))
        self.answers, self.failed = answers, dict(failed)


def without_answer(failed: Mapping[int, Exception], rows: int) -> str:
    """What is to be said of some of so many rows that have no answer: why the first one has none, and their number."""
    first = min(failed)
    count = f" ({len(failed)} of {rows} rows have no answer)" if len(failed) > 1 else ""
    return f"row {first}: {failed[first]}{count}"
