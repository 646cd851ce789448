"""Figure 1 in small: links trained in R rounds, asked in r, for link seeds of their own.

All links of a seed begin alike (`benchmarks.relay.stages`). From there the outer stage goes on in 1, 2 or 3 rounds, for
equally many steps.
"""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.stages import RATE, agents, align, answer, scaled
from recmas import RecursiveMAS
from recmas.lab.agents import relay_system
from recmas.lab.threads import one_thread

ROUNDS = (1, 2, 3)
BEFORE = 0
"""Rounds of the outer stage that has not begun: links as the warm-up left them."""


def measure(count: int, link_seed: int, scale: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell per rounds of training and of asking: which questions were right."""
    rows, steps = asked(count), scaled(scale)
    system = relay_system(agents(), link_seed)
    cells = []

    def note(trained: int) -> None:
        for rounds in ROUNDS:
            answers = system.answer(rows, rounds=rounds, batch_size=BATCH)
            cell = {"link_seed": link_seed, "trained": trained, "rounds": rounds, "correct": right(answers, rows)}
            cells.append(cell)

    with one_thread():
        align(system, link_seed, steps)
        begun = copy.deepcopy(_state(system))
        note(BEFORE)
        for rounds in ROUNDS:
            for edge, weights in begun.items():
                system.outer_links[edge].load_state_dict(weights)
            answer(system, link_seed, steps, rounds)
            note(rounds)
    return heading(count) | {"steps": steps, "learning_rate": RATE}, cells


def _state(system: RecursiveMAS) -> dict[Any, Any]:
    return {edge: link.state_dict() for edge, link in system.outer_links.items()}
