"""The lab's links: the order of stages that makes a system, or a recursion, out of three frozen agents.

Inner links, then a warm-up of every outer link, then the answer's cross entropy through one round, and where the task
takes more of them through one to three rounds at a learning rate that does not destroy what came before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from recmas.config.system_json import edge_name
from recmas.lab.tasks import LIST, RELAY, Rows, Task
from recmas.recursive_mas import RecursiveMAS
from recmas.training import InnerConfig, OuterConfig, WarmupConfig, train_inner, train_outer, train_warmup

_ALIGNED: dict[str, Any] = {"batch_size": 64, "schedule": "linear", "rounds": (1, 2, 3)}
_ANSWERED: dict[str, Any] = {"batch_size": 64, "schedule": "linear", "betas": (0.9, 0.99), "steps": 100}
_ANSWERED |= {"recompute": False, "micro_batch": 64}  # models this small leave room for their activations


@dataclass(frozen=True)
class LinkSettings:
    """Steps, batch sizes and learning rates.

    ``feedback`` is the warm-up of the link that closes the loop; like ``all_rounds``, a task of one round needs none.
    """

    inner: InnerConfig = field(default_factory=lambda: InnerConfig(**_ALIGNED, steps=250, learning_rate=2e-3))
    warmup: WarmupConfig = field(default_factory=lambda: WarmupConfig(**_ALIGNED, steps=300, learning_rate=3e-3))
    feedback: WarmupConfig | None = field(
        default_factory=lambda: WarmupConfig(**_ALIGNED, steps=700, learning_rate=4e-3)
    )
    one_round: OuterConfig = field(default_factory=lambda: OuterConfig(**_ANSWERED, rounds=1, learning_rate=5e-4))
    all_rounds: OuterConfig | None = field(
        default_factory=lambda: OuterConfig(**_ANSWERED, rounds=(1, 2, 3), learning_rate=5e-5)
    )


_FEW: dict[str, Any] = {"batch_size": 16, "schedule": "linear"}
SETTINGS = {
    RELAY.name: LinkSettings(),
    LIST.name: LinkSettings(
        InnerConfig(**_FEW, steps=150, learning_rate=2e-3),
        WarmupConfig(**_FEW, steps=200, learning_rate=3e-3),
        None,
        OuterConfig(**_ANSWERED | {"batch_size": 32, "steps": 50}, rounds=1, learning_rate=5e-4),
        None,
    ),
}
"""By task; a text of twenty tokens is worth ten of two."""


def train_links(
    system: RecursiveMAS,
    task: Task,
    seed: int,
    score: Callable[[RecursiveMAS], float],
    settings: LinkSettings,
    progress: bool = True,
) -> dict[str, Any]:
    """Train all links of a system in place and keep the stage's links that ``score`` likes best.

    Args:
        system: the task's agents with fresh links.
        task: that they are to do together.
        seed: of training questions and of their order.
        score: accuracy on validation questions, higher is better; called after the warm-up and after each outer stage.
        settings: of the stages.
        progress: show bars.

    Returns:
        Last losses by stage and link, validation scores by stage, and which stage was ``kept``.
    """

    def rows(config: Any) -> Callable[[int], Rows]:
        return task.training_rows(seed, config.batch_size)

    losses: dict[str, float] = {}
    scores: dict[str, float] = {}
    kept: dict[str, Mapping[str, Any]] = {}

    def note(stage: str) -> None:
        scores[stage] = score(system)
        if stage == max(scores, key=lambda name: scores[name]):
            kept.update({stage: copy.deepcopy(_links(system).state_dict())})

    inner = replace(settings.inner, seed=seed)
    for role, result in train_inner(system, rows(inner), inner, progress=progress).items():
        losses[f"inner {role}"] = result.loss
    forward = system.pattern.edges(1)
    for edges, warmup in ((forward, settings.warmup), (system.outer_links.keys() - forward, settings.feedback)):
        if warmup is None:
            continue
        warmup = replace(warmup, seed=seed)
        for edge, result in train_warmup(system, rows(warmup), warmup, edges=sorted(edges), progress=progress).items():
            losses[f"warmup {edge_name(edge)}"] = result.loss
    note("warmup")
    for stage, outer in (("one round", settings.one_round), ("all rounds", settings.all_rounds)):
        if outer is None:
            continue
        outer = replace(outer, seed=seed)
        losses[stage] = train_outer(system, rows(outer), outer, progress=progress).loss
        note(stage)
    best = max(scores, key=lambda name: scores[name])
    _links(system).load_state_dict(kept[best])
    return {"losses": losses, "validation": scores, "kept": best}


def _links(system: RecursiveMAS) -> nn.ModuleList:
    return nn.ModuleList([*system.inner_links.values(), *system.outer_links.values()])
