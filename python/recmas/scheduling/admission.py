"""Whether a row can be answered, and how long it will be, before any model runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import NamedTuple

from recmas.answering.manner import Manner
from recmas.prompts.rows import Fields, check_fields, earlier
from recmas.prompts.template import Slot
from recmas.sizing.row_bytes import added, slot_positions
from recmas.system.member import Member, Prompts


class Room(NamedTuple):
    """Positions of a row's prompts at one agent, slots left out, and of the agent's context, where known.

    Prompts are those of the first round and, where there are more, of all later ones.
    """

    positions: tuple[int, ...]
    context: int | None


class Admission:
    """Measures rows for one agent, beside its work or far from it.

    Args:
        prompts: of the agent, for this alone: a tokenizer serves one thread.
        context: positions of the agent's context, where known.
    """

    def __init__(self, prompts: Prompts, context: int | None) -> None:
        self._prompts, self._context, self._lock = prompts, context, threading.Lock()

    @classmethod
    def of(cls, member: Member) -> Admission:
        """With a copy of the member's tokenizer."""
        agent = member.agent
        tokenizer = copy.deepcopy(agent.tokenizer)
        return cls(Prompts(member.role, member.prompts.setting, tokenizer, agent.vocabulary), agent.context_length)

    def room(self, rounds: int, row: Fields, index: int = 0) -> Room:
        """What a row, number `index`, takes in a run of so many rounds.

        Raises:
            ValueError: the row lacks a field, or holds what no prompt can.
        """
        prompts, positions = self._prompts, []
        with self._lock:
            for round in range(1, min(rounds, 2) + 1):
                check_fields(row, index, dict.fromkeys(prompts.template(round).fields, prompts.role))
            if earlier(row):
                prompts.renderer.check_chat(row)
            for round in range(1, min(rounds, 2) + 1):
                segments = prompts.segments(round, row)
                positions.append(sum(len(segment) for segment in segments if not isinstance(segment, Slot)))
        return Room(tuple(positions), self._context)


def check_room(manner: Manner, rooms: Mapping[str, Room]) -> int:
    """The most positions that a visit of the row takes, with what is read and added.

    Raises:
        ValueError: a prompt and the latents that it reads exceed an agent's context; texts are not counted, since
            nobody knows them.
    """
    tokens = {role: how.max_new_tokens for role, how in manner.decoding.items()}
    mode, most = manner.options.mode, 0
    for visit in manner.pattern.visits(manner.rounds):
        room = rooms[visit.role]
        prompt = room.positions[min(visit.round, 2) - 1]
        read = slot_positions(visit, manner.pattern, mode, manner.latent_steps, tokens)
        adds = added(visit, mode, manner.latent_steps, tokens)
        thinks = mode == "latent" and not visit.final
        sure = prompt + (read if mode == "latent" else 0) + (max(adds - 1, 0) if thinks else 0)
        if room.context is not None and sure > room.context:
            raise ValueError(
                f"agent {visit.role!r}: the prompt takes {sure} positions with its latents, more than the "
                f"{room.context} of its context"
            )
        most = max(most, prompt + read + adds)
    return most
