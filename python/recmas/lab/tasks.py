"""The lab's tasks: all in which the relay and the lists differ, before any training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recmas.config.pattern import SEQUENTIAL
from recmas.config.system_json import PromptSpec
from recmas.lab import lists, world
from recmas.lab.world import MAX_HOPS, Turn, World
from recmas.recursive_mas import RecursiveMAS

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Task:
    """What three agents do together.

    Attributes:
        name: on the command line and in records.
        prompts: templates by role, as `PromptSpec` takes them; lessons are rendered with the very same ones.
        marks: words of every tokenizer besides names and facts.
        latent_steps: by role; as many as the agent's own message has tokens.
        max_new_tokens: of a message.
        hops: of its questions; one of k hops needs k rounds.
        training_hops: of training questions; repeats give weight.
        questions: ``(split, seed, hops, count, first=0)`` to rows.
        turns: ``(role, world, rng)`` to the exchanges of that role's lessons.
        one_message: roles whose exchanges share one message, each behind questions of its own.
        vocabulary: rows of each agent's table of embeddings; None has no more than its tokens.
    """

    name: str
    prompts: Mapping[str, Mapping[str, str]]
    marks: tuple[str, ...]
    latent_steps: Mapping[str, int]
    max_new_tokens: int
    hops: tuple[int, ...]
    training_hops: tuple[int, ...]
    questions: Callable[..., Rows]
    turns: Callable[[str, World, random.Random], Iterator[Turn]]
    one_message: tuple[str, ...] = ()
    vocabulary: int | None = None

    def training_rows(self, seed: int, batch_size: int) -> Callable[[int], Rows]:
        """Batch index -> that batch's own fresh training questions."""
        return lambda index: self.questions("train", seed, self.training_hops, batch_size, first=index * batch_size)

    def specs(self) -> dict[str, PromptSpec]:
        """The templates as a system takes them."""
        return {role: PromptSpec(**templates) for role, templates in self.prompts.items()}


RELAY = Task(
    "relay",
    prompts={
        "planner": {
            "first": "<bos> {{planner_sheet}} <in> {{question}} <out>",
            "later": "<bos> {{planner_sheet}} <in> {{from:solver}} <out>",
        },
        "critic": {"first": "<bos> {{critic_sheet}} <in> {{from:planner}} <out>"},
        "solver": {"first": "<bos> {{solver_sheet}} <in> {{from:critic}} <out>"},
    },
    marks=("<in>", "<out>", *map(str, range(MAX_HOPS + 1))),
    latent_steps={"planner": 2, "critic": 2, "solver": 3},
    max_new_tokens=4,
    hops=(1, 2, 3),
    training_hops=(0, 0, 1, 1, 2, 3, 4),  # zero, passing a finished word on, must be in every batch or it is forgotten
    questions=world.questions,
    turns=world.turns,
)

LIST = Task(
    "list",
    prompts={
        "planner": {"first": "<bos> {{planner_sheet}} <in> {{question}} <out>"},
        "critic": {"first": "<bos> {{critic_sheet}} <in> {{from:planner}} <out>"},
        "solver": {"first": "<bos> {{solver_sheet}} <in> {{from:critic}} <out> {{number}}"},
    },
    marks=("<in>", "<out>", *lists.NUMBERS),
    latent_steps={"planner": 2 * lists.LENGTH, "critic": 2 * lists.LENGTH, "solver": 0},
    max_new_tokens=2 * lists.LENGTH + 1,
    hops=(1,),
    training_hops=(1,),
    questions=lists.questions,
    turns=lists.turns,
    one_message=("solver",),
    vocabulary=32_000,
)

TASKS = {task.name: task for task in (RELAY, LIST)}


def task_named(name: str) -> Task:
    """The task of this name, or ValueError."""
    if name not in TASKS:
        raise ValueError(f"task: {name!r} is none of {', '.join(TASKS)}")
    return TASKS[name]


def task_of(system: RecursiveMAS) -> Task:
    """The task whose prompts these are; ValueError for a system that is no lab's."""
    prompts: dict[str, Any] = {role: setting.prompt for role, setting in system.settings.items()}
    for task in TASKS.values():
        if system.pattern == SEQUENTIAL and prompts == task.specs():
            return task
    raise ValueError(
        "system: is no lab; expected planner, critic and solver in sequence with the lab's own prompts, "
        "as recmas lab build makes them"
    )
