"""The settings of an agent that nobody wrote any for."""

from __future__ import annotations

from recmas.agents.agent import Agent
from recmas.config.pattern import Pattern
from recmas.config.system_json import AgentSpec, PromptSpec
from recmas.prompts.template import Slot


def default_settings(pattern: Pattern, role: str, agent: Agent) -> AgentSpec:
    """Plain prompts for any pattern: the question, the notes of every sender, and a cue."""

    def text(round: int) -> str:
        senders = pattern.senders(role, round)
        slots = [senders] if senders and pattern.combine != "slots" else [(sender,) for sender in senders]
        notes = "".join(f"Notes of the {' and the '.join(names)}: {Slot(names)}\n" for names in slots)
        cue = "Answer:" if role == pattern.last else f"Notes of the {role}:"
        return f"Question: {{{{question}}}}\n{notes}{cue}"

    first, later = text(1), text(2)
    prompt = PromptSpec(first if first != later else None, later)
    chat = bool(getattr(agent.tokenizer, "chat_template", None))
    return AgentSpec(model=agent.source or "", prompt=prompt, chat=chat)
