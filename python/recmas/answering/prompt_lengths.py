"""How long the prompts of a run are, before any model runs: all but the texts that will fill slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recmas.agents.model import PromptTooLongError
from recmas.answering.plan import Plan
from recmas.config.pattern import Visit
from recmas.prompts.rows import Fields
from recmas.prompts.template import Slot
from recmas.sizing.row_bytes import Length, added, longest, slot_positions


def check_lengths(plan: Plan, rows: Sequence[Fields]) -> None:
    """Raise ValueError, naming the row, if a prompt does not fit its agent's context whatever texts it reads.

    Latents are counted, but for those that `on_message` may replace; texts are not.
    """
    visits = [visit for visit in plan.system.pattern.visits(plan.rounds) if visit.round <= 2 or visit.final]
    for visit in visits:
        agent = plan.system.agents[visit.role]
        thinks = plan.options.mode == "latent" and not visit.final
        steps = plan.latent_steps[visit.role] if thinks else 1
        if agent.context_length is None or steps == 0:
            continue
        known = plan.options.mode == "latent" and plan.on_message is None
        received = _received(plan, visit) if known else 0
        no_texts = {} if plan.options.mode == "latent" else dict.fromkeys(visit.senders, "")
        try:
            agent.check_context([_read(plan, visit, row, no_texts) + received for row in rows], steps - 1)
        except PromptTooLongError as error:
            raise ValueError(f"row {error.row}: {error}") from error


def lengths_of(plan: Plan, row: Fields) -> dict[str, Length]:
    """By role, the most positions of a row's prompts and of what is added to them."""
    tokens = {role: how.max_new_tokens for role, how in plan.decoding.items()}
    return longest(
        {
            visit.role: Length(
                _read(plan, visit, row) + _received(plan, visit),
                added(visit, plan.options.mode, plan.latent_steps, tokens),
            )
        }
        for visit in plan.system.pattern.visits(min(plan.rounds, 2))
    )


def _read(plan: Plan, visit: Visit, row: Fields, texts: Mapping[str, str] | None = None) -> int:
    """Positions of one prompt, slots aside."""
    segments = plan.system.segments(visit, row, texts)
    return sum(len(segment) for segment in segments if not isinstance(segment, Slot))


def _received(plan: Plan, visit: Visit) -> int:
    """Positions of the messages in a prompt, at most."""
    tokens = {role: how.max_new_tokens for role, how in plan.decoding.items()}
    return slot_positions(visit, plan.system.pattern, plan.options.mode, plan.latent_steps, tokens)
