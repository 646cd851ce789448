"""How long the prompts of a run are, known before any model runs: all of them but what texts will stand in slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recmas.agent import PromptTooLongError
from recmas.memory.rows import Length, added, longest, slot_positions
from recmas.prompts import Slot

if TYPE_CHECKING:
    from recmas.pattern import Visit
    from recmas.running import Plan

Fields = Mapping[str, object]


def check_lengths(plan: Plan, rows: Sequence[Fields]) -> None:
    """Raise ValueError, naming the row, if a prompt does not fit its agent's context whatever it hears.

    Latents are counted, but for those that `on_message` may replace; texts are not.
    """
    visits = [visit for visit in plan.mas.pattern.visits(plan.rounds) if visit.round <= 2 or visit.final]
    for visit in visits:
        agent = plan.mas.agents[visit.role]
        thinks = plan.mode == "latent" and not visit.final
        steps = plan.latent_steps[visit.role] if thinks else 1
        if agent.context_length is None or steps == 0:
            continue
        known = plan.mode == "latent" and plan.on_message is None
        heard = _heard(plan, visit) if known else 0
        silent = {} if plan.mode == "latent" else dict.fromkeys(visit.senders, "")
        try:
            agent.check_context([_read(plan, visit, row, silent) + heard for row in rows], steps - 1)
        except PromptTooLongError as error:
            raise ValueError(f"row {error.row}: {error}") from error


def lengths_of(plan: Plan, row: Fields) -> dict[str, Length]:
    """By role, the most positions of a row's prompts and of what is added to them."""
    tokens = {role: how.max_new_tokens for role, how in plan.decoding.items()}
    return longest(
        {
            visit.role: Length(
                _read(plan, visit, row) + _heard(plan, visit),
                added(visit, plan.mode, plan.latent_steps, tokens),
            )
        }
        for visit in plan.mas.pattern.visits(min(plan.rounds, 2))
    )


def _read(plan: Plan, visit: Visit, row: Fields, texts: Mapping[str, str] | None = None) -> int:
    """Positions of one prompt, slots aside."""
    segments = plan.mas.segments(visit, row, texts)
    return sum(len(segment) for segment in segments if not isinstance(segment, Slot))


def _heard(plan: Plan, visit: Visit) -> int:
    """Positions of the messages in a prompt, at most."""
    tokens = {role: how.max_new_tokens for role, how in plan.decoding.items()}
    return slot_positions(visit, plan.mas.pattern, plan.mode, plan.latent_steps, tokens)
