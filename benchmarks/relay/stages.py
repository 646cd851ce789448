"""How links begin where a benchmark trains them: short stages, which leave something to tell apart.

Links come from a short inner stage and a short warm-up, since answers alone teach nothing here
(examples/relay/README.md). Four times as long, the warm-up already answers 0.99 of all questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.relay.asked import RELAY
from recmas import Agent, RecursiveMAS
from recmas.lab.links import LinkSettings
from recmas.lab.tasks import RELAY as TASK
from recmas.lab.world import ROLES
from recmas.training import train_inner, train_outer, train_warmup

STEPS = {"inner": 60, "warmup": 30, "feedback": 60, "outer": 60}
RATE = 1e-4
"""Of the outer stage, whatever its rounds; more tends to destroy a recursion of several."""


def agents() -> dict[str, Agent]:
    """The shipped agents, in the precision that links are trained in."""
    return {role: Agent.from_pretrained(RELAY / "agents" / role, torch.float32, name=role) for role in ROLES}


def scaled(scale: float) -> dict[str, int]:
    """Steps of each stage."""
    return {stage: max(1, round(scale * steps)) for stage, steps in STEPS.items()}


def check_same(record: Mapping[str, Any], count: int, scale: float) -> None:
    """Raise ValueError unless cells of these questions and steps may join those of the record."""
    if (record["questions"]["count"], record["steps"]) != (count, scaled(scale)):
        raise ValueError("the record is of other questions or training steps; write to a new file")


def align(system: RecursiveMAS, seed: int, steps: Mapping[str, int]) -> None:
    """Inner links and the warm-up of outer ones, as `recmas lab build` does it, in fewer steps."""
    settings = LinkSettings()
    forward = system.pattern.edges(1)
    inner = replace(settings.inner, steps=steps["inner"], seed=seed)
    train_inner(system, TASK.training_rows(seed, inner.batch_size), inner, progress=False)
    for edges, stage in ((forward, "warmup"), (system.outer_links.keys() - forward, "feedback")):
        warmup = replace(getattr(settings, stage), steps=steps[stage], seed=seed)
        train_warmup(system, TASK.training_rows(seed, warmup.batch_size), warmup, edges=sorted(edges), progress=False)


def answer(system: RecursiveMAS, seed: int, steps: Mapping[str, int], rounds: int | tuple[int, ...]) -> None:
    """The outer stage from there: the answers' cross entropy in so many rounds."""
    outer = replace(LinkSettings().all_rounds, rounds=rounds, steps=steps["outer"], learning_rate=RATE, seed=seed)
    train_outer(system, TASK.training_rows(seed, outer.batch_size), outer, progress=False)
