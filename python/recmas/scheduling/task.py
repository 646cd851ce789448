"""`Task`: what one agent does for one batch of rows. It holds data only, so it can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recmas.config.pattern import Visit
from recmas.prompts.rows import Fields


class Work(NamedTuple):
    """What an agent does; rows of equal work may share a batch, in whichever round each of them is.

    Attributes:
        role: the agent.
        mode: what its prompts' slots hold: "latent" or "text".
        latent_steps: of the message; None where text is written.
        temperature, top_p: of that text.
        final: the text is the answer, and shown as it grows.
    """

    role: str
    mode: str
    latent_steps: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    final: bool = False


class Piece(NamedTuple):
    """One row's message: a row of a batch of messages, which only the executor can look into."""

    batch: Any
    row: int


@dataclass(frozen=True)
class Part:
    """One row of a task.

    Attributes:
        number: names the row.
        visit: where it is on its walk.
        fields: what its prompts are made of.
        again: its round at the agent's next visit, None if there is none.
        max_new_tokens: of the text that is written.
        stream: names the text's random stream, with `number` left out.
        nearest: tokens of the vocabulary that are looked up for each latent it reads.
    """

    number: int
    visit: Visit
    fields: Fields
    again: int | None = None
    max_new_tokens: int = 0
    stream: tuple[int, ...] = ()
    nearest: int = 0


@dataclass
class Task:
    """A batch of rows at one agent.

    Attributes:
        number: names the task.
        work: what is done.
        parts: the rows.
        messages: what they read, by sender; None for a row that reads nothing of that sender.
        dropped: rows, by their place in the batch, whose text nobody waits for any more.
    """

    number: int
    work: Work
    parts: Sequence[Part]
    messages: Mapping[str, Sequence[Piece | None]]
    dropped: set[int] = field(default_factory=set)


@dataclass
class Took:
    """What a task took for one row.

    Attributes:
        seconds: until the row had ended.
        positions: of its prompt, messages included.
        latent_steps, written: tokens that the agent wrote, results of tools left out.
        complete: the text ends with an end-of-text token, not at a bound.
        nearest: by sender, per latent: token and cosine.
        tool_calls: of the last agent.
    """

    seconds: float
    positions: int
    latent_steps: int = 0
    written: int = 0
    complete: bool = False
    nearest: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    tool_calls: list[Any] = field(default_factory=list)


@dataclass
class Grown:
    """What one step of decoding added to a row.

    Attributes:
        tokens: their ids, those of tools' results included.
        text: that became certain.
        took: where the row has ended.
    """

    tokens: list[int]
    text: str
    took: Took | None = None


@dataclass
class Account:
    """What a task took, by row where lists are.

    Attributes:
        seconds: from its begin to its end.
        positions: of the prompts, messages included.
        latent_steps, written: of each row; tokens that the agent wrote, results of tools left out.
        complete: rows whose text ends with an end-of-text token.
        nearest: by row and sender, per latent: token and cosine.
        tool_calls: of the last agent.
    """

    seconds: float = 0.0
    positions: list[int] = field(default_factory=list)
    latent_steps: int = 0
    written: list[int] = field(default_factory=list)
    complete: set[int] = field(default_factory=set)
    nearest: dict[int, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    tool_calls: list[list[Any]] = field(default_factory=list)

    def of(self, place: int) -> Took:
        """What it took for one row."""
        return Took(
            self.seconds,
            self.positions[place],
            self.latent_steps,
            self.written[place] if self.written else 0,
            place in self.complete,
            self.nearest.get(place, {}),
            list(self.tool_calls[place]) if self.tool_calls else [],
        )
