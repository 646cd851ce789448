"""How long what agents read and say is, in all rows, before the first step: no run ends halfway for one of them."""

from __future__ import annotations

from collections.abc import Sequence

from recmas.agents.targets import target_tokens
from recmas.config.pattern import Visit
from recmas.prompts.rows import Fields
from recmas.prompts.template import Slot
from recmas.system.system import System
from recmas.training.config import OuterConfig, each_round_count, weighed_rounds
from recmas.training.data import target_texts
from recmas.training.pairs import utterances

ROWS = 256
"""Whose token ids are held at once."""


def check_utterances(
    system: System, role: str, rows: Sequence[Fields], rounds: Sequence[int], max_tokens: int | None
) -> None:
    """What `role` reads and says in these rounds, one forward each.

    Raises:
        ValueError: it does not fit the agent's context, or the text has no tokens; names the row.
    """
    for round in rounds:
        for first in range(0, len(rows), ROWS):
            said = utterances(system, role, rows[first : first + ROWS], round, max_tokens=max_tokens)
            for index, one in enumerate(said, start=first):
                if not one.said:
                    raise ValueError(f"row {index}: the text for agent {role!r} has no tokens")
                _check(system, role, index, len(one.prompt), len(one.said) - 1)


def check_unrolled(system: System, rows: Sequence[Fields], config: OuterConfig) -> None:
    """What all agents read, think and say when the recursion is unrolled.

    Raises:
        ValueError: it does not fit an agent's context, or messages that meet in one slot differ in length; names the
            row.
    """
    visits = {
        (visit.role, visit.round, visit.final): visit
        for rounds in each_round_count(config.rounds)
        for visit in system.pattern.visits(rounds)
    }
    for first in range(0, len(rows), ROWS):
        counted = _Unrolled(system, rows[first : first + ROWS], config)
        for visit in visits.values():
            for index in range(len(counted.rows)):
                try:
                    read = counted.read(visit, index)
                except _UnequalError as error:
                    raise ValueError(f"row {first + index}: {error}") from None
                _check(system, visit.role, first + index, read, max(0, counted.said(visit, index) - 1))


class _UnequalError(Exception):
    """Messages that meet in one slot differ in length."""


class _Unrolled:
    """Positions of some rows in the unrolled recursion."""

    def __init__(self, system: System, rows: Sequence[Fields], config: OuterConfig) -> None:
        self.system, self.rows = system, rows
        self._forced, self._steps = config.latents == "forced", system.steps_by_role(config.latent_steps)
        counts = each_round_count(config.rounds)
        self._counted = {round for rounds in counts for round in weighed_rounds(config.round_weights, rounds)}
        self._prompts: dict[tuple[str, bool], list[tuple[int, list[Slot]]]] = {}
        self._texts: dict[tuple[str, int], list[int]] = {}

    def said(self, visit: Visit, index: int) -> int:
        """Tokens that an agent is forced to say, or latents that it thinks; the more of both."""
        answer = self._tokens(visit.role, visit.round)[index] if self._answers(visit) else 0
        return answer if visit.final else max(answer, self._message(visit.role, visit.round, index))

    def read(self, visit: Visit, index: int) -> int:
        """Positions of a prompt, its slots filled."""
        if not self._answers(visit) and self._steps[visit.role] == 0:
            return 0  # nothing reads it
        positions, slots = self._prompt(visit)[index]
        sent = dict(zip(visit.senders, visit.sender_rounds, strict=True))
        for slot in slots:
            counts = {sender: self._message(sender, sent[sender], index) for sender in slot.senders}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{count} of {sender!r}" for sender, count in counts.items())
                raise _UnequalError(f"agent {visit.role!r}: {slot} needs equally many latents of each, but has {told}")
            positions += max(counts.values())
        return positions

    def _answers(self, visit: Visit) -> bool:
        return visit.role == self.system.pattern.last and visit.round in self._counted

    def _message(self, role: str, round: int, index: int) -> int:
        steps = self._steps[role]
        return min(steps, self._tokens(role, round)[index]) if self._forced and steps else steps

    def _prompt(self, visit: Visit) -> list[tuple[int, list[Slot]]]:
        """Positions beside the slots, and the slots; by row."""
        key = (visit.role, visit.round == 1)
        if key not in self._prompts:
            parts = [self.system.segments(visit, row) for row in self.rows]
            self._prompts[key] = [
                (sum(len(part) for part in row if not isinstance(part, Slot)), [p for p in row if isinstance(p, Slot)])
                for row in parts
            ]
        return self._prompts[key]

    def _tokens(self, role: str, round: int) -> list[int]:
        if (role, round) not in self._texts:
            texts = target_texts(self.rows, role, round)
            self._texts[role, round] = list(map(len, target_tokens(self.system.agents[role], texts)))
        return self._texts[role, round]


def _check(system: System, role: str, row: int, read: int, added: int) -> None:
    context = system.agents[role].context_length
    if context is not None and read + added > context:
        after = f" and {added} positions after it" if added else ""
        raise ValueError(
            f"row {row}: agent {role!r}: a prompt of {read} positions{after} exceeds its context of {context}"
        )
