"""What each agent should say, by a row's "targets". No torch here.

A target is one text, said in every round, or one text per round::

    {"targets": {"planner": "1 red", "critic": ["1 cat", "0 cat"], "solver": ["1 dilo", "0 dilo"]}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recmas.prompts.rows import Fields, readable


def target_text(row: Fields, index: int, role: str, round: int) -> str:
    """What agent ``role`` should say in ``round`` of one row; ``index`` begins error messages.

    Raises:
        ValueError: the row has no text for this agent and round; names the row, the agent and what was found.
    """
    targets = row.get("targets")
    if not isinstance(targets, Mapping):
        raise ValueError(f"row {index}: expected 'targets' to be an object of texts by agent, got {targets!r}")
    if role not in targets:
        raise ValueError(f"row {index}: targets has no text for agent {role!r}, only for {sorted(targets)}")
    text = targets[role]
    if isinstance(text, Sequence) and not isinstance(text, str):
        if round > len(text):
            raise ValueError(f"row {index}: targets of {role!r} cover {len(text)} rounds, round {round} is needed")
        text = text[round - 1]
    if not isinstance(text, str):
        raise ValueError(f"row {index}: expected the target of agent {role!r} to be text, got {text!r}")
    return readable(text, f"row {index}: the target of agent {role!r}")


def check_target(row: Fields, index: int, role: str, round: int) -> None:
    """Raise ValueError, naming the row, unless it has a `target_text` that says something.

    To say nothing is hardly ever what a row means: an agent would learn to end at once.
    """
    if not target_text(row, index, role, round).strip():
        raise ValueError(f"row {index}: the target of agent {role!r} in round {round} is empty")
