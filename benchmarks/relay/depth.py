"""Figure 1 in small: links trained in R rounds, asked in r, for link seeds of their own.

All links of a seed begin alike, from a short inner stage and a short warm-up, since answers alone teach nothing here
(examples/relay/README.md). From there the outer stage goes on in 1, 2 or 3 rounds, for equally many steps. The warm-up
is cut so short that it leaves something to learn: four times as long, it already answers 0.99 of all questions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.relay.asked import BATCH, RELAY, asked, heading, right
from recmas import Agent, RecursiveMAS
from recmas.lab.agents import relay_system
from recmas.lab.links import LinkSettings, training_rows
from recmas.lab.threads import one_thread
from recmas.lab.world import ROLES
from recmas.training import train_inner, train_outer, train_warmup

ROUNDS = (1, 2, 3)
BEFORE = 0
"""Rounds of the outer stage that has not begun: links as the warm-up left them."""
STEPS = {"inner": 60, "warmup": 30, "feedback": 60, "outer": 60}
RATE = 1e-4
"""Of the outer stage, whatever its rounds; more tends to destroy a recursion of several."""


def measure(count: int, link_seed: int, scale: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell per rounds of training and of asking: which questions were right."""
    rows, steps = asked(count), scaled(scale)
    agents = {role: Agent.from_pretrained(RELAY / "agents" / role, torch.float32, name=role) for role in ROLES}
    system = relay_system(agents, link_seed)
    cells = []

    def note(trained: int) -> None:
        for rounds in ROUNDS:
            answers = system.answer(rows, rounds=rounds, batch_size=BATCH)
            cell = {"link_seed": link_seed, "trained": trained, "rounds": rounds, "correct": right(answers, rows)}
            cells.append(cell)

    with one_thread():
        _begin(system, link_seed, steps)
        begun = copy.deepcopy(_state(system))
        note(BEFORE)
        for rounds in ROUNDS:
            for edge, weights in begun.items():
                system.outer_links[edge].load_state_dict(weights)
            outer = replace(
                LinkSettings().all_rounds, rounds=rounds, steps=steps["outer"], learning_rate=RATE, seed=link_seed
            )
            train_outer(system, training_rows(link_seed, outer.batch_size), outer, progress=False)
            note(rounds)
    return heading(count) | {"steps": steps, "learning_rate": RATE}, cells


def scaled(scale: float) -> dict[str, int]:
    """Steps of each stage."""
    return {stage: max(1, round(scale * steps)) for stage, steps in STEPS.items()}


def check_same(record: Mapping[str, Any], count: int, scale: float) -> None:
    """Raise ValueError unless cells of these questions and steps may join those of the record."""
    if (record["questions"]["count"], record["steps"]) != (count, scaled(scale)):
        raise ValueError("the record is of other questions or training steps; write to a new file")


def _begin(system: RecursiveMAS, seed: int, steps: Mapping[str, int]) -> None:
    """Inner links and the warm-up of outer ones, as `recmas lab build` does it, in fewer steps."""
    settings = LinkSettings()
    forward = system.pattern.edges(1)
    inner = replace(settings.inner, steps=steps["inner"], seed=seed)
    train_inner(system, training_rows(seed, inner.batch_size), inner, progress=False)
    for edges, stage in ((forward, "warmup"), (system.outer_links.keys() - forward, "feedback")):
        warmup = replace(getattr(settings, stage), steps=steps[stage], seed=seed)
        train_warmup(system, training_rows(seed, warmup.batch_size), warmup, edges=sorted(edges), progress=False)


def _state(system: RecursiveMAS) -> dict[Any, Any]:
    return {edge: link.state_dict() for edge, link in system.outer_links.items()}
