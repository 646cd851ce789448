"""What a recursive system is compared with, made of the same agents and prompts.

The recursive text system needs nothing of its own: it is ``mas.answer(..., mode="text")``.
"""

from __future__ import annotations

from dataclasses import replace

from recmas.pattern import Pattern
from recmas.spec import Defaults, PromptSpec
from recmas.system import RecursiveMAS


def single_agent(mas: RecursiveMAS, role: str | None = None, prompt: str | None = None) -> RecursiveMAS:
    """One agent of the system by itself: it hears nobody and answers in one round.

    Args:
        mas: the system whose agent, chat settings and decoding these are.
        role: the agent; None takes the one that answers.
        prompt: its template; None takes its template of round 1 with the slots left out.

    Raises:
        ValueError: an unknown role, or a prompt with a slot.
    """
    role = mas.pattern.last if role is None else role
    if role not in mas.agents:
        raise ValueError(f"role: unknown role {role!r}; the pattern has {', '.join(mas.pattern.roles)}")
    text = mas.template(role, 1).without_slots() if prompt is None else prompt
    setting = replace(mas.settings[role], prompt=PromptSpec(text))
    alone = Pattern(((role,),))
    return RecursiveMAS({role: mas.agents[role]}, {}, {}, alone, settings={role: setting}, defaults=Defaults(1, 0))
