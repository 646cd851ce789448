"""`Row`: a question on its way through a system, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from recmas.answering.answers import Answer
from recmas.answering.manner import Manner
from recmas.config.pattern import Visit
from recmas.prompts.rows import Fields
from recmas.scheduling.task import Grown, Part, Piece, Took, Work
from recmas.system.walk import Walk


@dataclass
class VisitDone:
    """One visit of a row.

    Attributes:
        round, stage, role: which.
        rows: that were in the batch.
        seconds: of the batch, until this row had ended.
        positions: of the row's prompt, messages included.
        latent_steps, text_tokens: of the message or answer.
        complete: the text ends with an end-of-text token, not at a bound.
        nearest: by sender, per latent that was read: token and cosine.
    """

    round: int
    stage: int
    role: str
    rows: int
    seconds: float
    positions: int
    latent_steps: int
    text_tokens: int
    complete: bool = False
    nearest: dict[str, list[dict[str, float]]] = field(default_factory=dict)


class Sink(Protocol):
    """Who waits for a row. Called from the dispatcher's thread: quickly, and without an exception."""

    def text(self, piece: str) -> None:
        """The next piece of the answer."""

    def visited(self, visit: VisitDone) -> None:
        """A visit has ended."""

    def answered(self, answer: Answer) -> None:
        """The end: the answer."""

    def failed(self, error: Exception) -> None:
        """The end: why there is no answer."""


class Row:
    """A question on its way.

    Args:
        number: names the row.
        fields: of the question.
        manner: how it is answered.
        sink: who waits for it.
        stream: names its random streams, before round and role.
        tokens: positions that its longest visit takes, for the budget of a batch.
        nearest: tokens to look up for each latent; 0 looks up none.
        deadline: on the clock of `time.monotonic`; None waits as long as it takes.
    """

    def __init__(
        self,
        number: int,
        fields: Fields,
        manner: Manner,
        sink: Sink,
        *,
        stream: tuple[int, int] = (0, 0),
        tokens: int = 1,
        nearest: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.number, self.fields, self.manner, self.sink = number, fields, manner, sink
        self.tokens, self.nearest, self.deadline = tokens, nearest, deadline
        self._stream = stream
        self.alone = 0
        """Rows that share a batch with this one have the same number here: 0, until a batch has failed."""
        self.losses = 0
        """Batches of this row that were lost since it last came further than before."""
        self._furthest = 0
        self.arrival = 0
        """Its place among all rows of a dispatcher, which gives it."""
        self.over = False
        self.turn = 0
        """How often it has begun its walk."""
        self._shown = ""
        self.begin_again()

    def begin_again(self) -> None:
        """Begin the walk: at first, and where messages were lost. Text that was shown is not shown again."""
        self.turn += 1
        self._ended = 0
        self._walk: Walk[Piece] = Walk(self.manner.pattern, self.manner.rounds)
        self._sent: dict[Visit, dict[str, Piece]] = {}
        self.answer = Answer()
        self.since = time.monotonic()

    def due(self) -> list[tuple[Visit, Work]]:
        """What can begin now."""
        return [(visit, self._work(visit)) for visit in self._walk.ready()]

    @property
    def entering(self) -> bool:
        """Nothing has been done for it yet."""
        return not self._sent

    def begin(self, visit: Visit) -> tuple[Part, Mapping[str, Piece]]:
        """Begin a visit, or repeat one that was lost."""
        if visit not in self._sent:
            self._sent[visit] = self._walk.begin(visit)
        if visit.final:
            self.answer.text, self.answer.tokens, self.answer.rounds = "", [], visit.round
        how = self.manner.decoding[visit.role]
        seed, number = self._stream
        stream = (seed, visit.round, self.manner.pattern.roles.index(visit.role), number)
        part = Part(
            self.number,
            visit,
            self.fields,
            visit.round + 1 if visit.round < self.manner.rounds else None,
            how.max_new_tokens,
            stream,
            self.nearest,
        )
        return part, self._sent[visit]

    def grow(self, grown: Grown) -> None:
        """The answer has grown; what was shown before its batch was lost comes again, and is passed over."""
        answer, shown = self.answer, self._shown
        answer.tokens += grown.tokens
        answer.text += grown.text
        if not (answer.text.startswith(shown) or shown.startswith(answer.text)):
            raise ValueError("the answer cannot be continued: its repetition began with another text")
        if len(answer.text) > len(shown):
            self._shown = answer.text
            self.sink.text(answer.text[len(shown) :])

    def end(self, visit: Visit, rows: int, piece: Piece, took: Took) -> None:
        """A visit has ended, in a batch of so many rows."""
        self._walk.end(visit, piece)
        self._ended += 1
        if self._ended > self._furthest:  # what comes again after a loss is no progress
            self._furthest, self.losses, self.alone = self._ended, 0, 0
        answer, role = self.answer, visit.role
        if self._work(visit).latent_steps is None:
            answer.text_tokens[role] = answer.text_tokens.get(role, 0) + took.written
        else:
            answer.latent_steps[role] = answer.latent_steps.get(role, 0) + took.latent_steps
        if visit.final:
            answer.tool_calls = took.tool_calls
        done = VisitDone(
            visit.round,
            visit.stage,
            role,
            rows,
            took.seconds,
            took.positions,
            took.latent_steps,
            took.written,
            took.complete,
            took.nearest,
        )
        self.sink.visited(done)
        self.since = time.monotonic()
        if self._walk.done:
            self._end()
            self.sink.answered(answer)

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        if not self.over:
            self._end()
            self.sink.failed(error)

    def _end(self) -> None:
        """Let go of the messages: whoever asks may keep thousands of rows until the last one has ended."""
        self.over = True
        del self._walk, self._sent

    def _work(self, visit: Visit) -> Work:
        manner, role = self.manner, visit.role
        mode = manner.options.mode
        if mode == "latent" and not visit.final:
            return Work(role, mode, manner.latent_steps[role])
        how = manner.decoding[role]
        return Work(role, mode, None, how.temperature, how.top_p, visit.final)
