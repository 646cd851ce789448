"""What a lab's system can do: accuracy for hops x rounds, in latents and in text, and the controls that must fail."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from recmas.config.pattern import Visit
from recmas.engine.messages import Latents
from recmas.evaluation import METRICS
from recmas.evaluation.baselines import single_agent
from recmas.lab.agents import relay_system
from recmas.lab.tasks import Task, task_of
from recmas.lab.world import chance
from recmas.recursive_mas import RecursiveMAS

MODES = ("latent", "text")
CONTROLS = ("solver alone", "untrained links", "shuffled latents")
BATCH = 256


@dataclass(frozen=True)
class Measurement:
    """One way of answering questions of ``hops`` hops in ``rounds`` rounds.

    ``accuracy`` and ``chance`` are shares; ``text_tokens`` (decoded by all agents), ``latent_steps`` and ``seconds``
    are per question. The solver alone is measured once per number of hops, as zero rounds: it reads no messages.
    """

    method: str
    hops: int
    rounds: int
    questions: int
    accuracy: float
    chance: float
    text_tokens: float
    latent_steps: float
    seconds: float


def grid(
    system: RecursiveMAS,
    seed: int,
    count: int,
    *,
    hops: Sequence[int] | None = None,
    rounds: Sequence[int] | None = None,
    methods: Sequence[str] = (*MODES, *CONTROLS),
    split: str = "test",
    on_cell: Callable[[Measurement], object] | None = None,
) -> list[Measurement]:
    """Measure every method on every cell, on ``count`` fresh questions per number of hops.

    Args:
        system: of a task of the lab.
        seed: of the questions' worlds.
        count: questions per number of hops; all rounds and methods answer the same ones.
        hops, rounds: the grid's sides; None takes the task's hops for both.
        methods: of ``MODES`` and ``CONTROLS``.
        split: "test", or "validation" for choosing between systems.
        on_cell: called with each finished cell.

    Raises:
        ValueError: an unknown method, or as `check`.
    """
    if unknown := [method for method in methods if method not in (*MODES, *CONTROLS)]:
        raise ValueError(f"methods: {unknown[0]!r} is not one of {', '.join((*MODES, *CONTROLS))}")
    task = check(system, count)
    systems = dict.fromkeys(methods, system)
    if "untrained links" in methods:
        systems["untrained links"] = relay_system(system.agents, seed, task)
    if "solver alone" in methods:
        systems["solver alone"] = _solver_alone(system, task)
    cells = []
    for hop_count in hops or task.hops:
        rows = task.questions(split, seed, [hop_count], count)
        for method, round_count in runs(methods, rounds or task.hops):
            cell = _measure(systems[method], method, rows, hop_count, round_count)
            cells.append(cell)
            if on_cell is not None:
                on_cell(cell)
    return cells


def check(system: RecursiveMAS, count: int) -> Task:
    """The system's task; ValueError unless it is the lab's and ``count`` questions can be measured."""
    task = task_of(system)
    if count < 2:
        raise ValueError(f"count: {count} is too few; latents are shuffled among 2 questions or more")
    return task


def runs(methods: Sequence[str], rounds: Sequence[int]) -> list[tuple[str, int]]:
    """Every (method, rounds) that is measured for one number of hops; the solver alone goes no rounds."""
    return [
        (method, count)
        for method, count in itertools.product(methods, rounds)
        if method != "solver alone" or count == rounds[0]
    ]


def _measure(
    system: RecursiveMAS, method: str, rows: Sequence[dict[str, object]], hops: int, rounds: int
) -> Measurement:
    alone = method == "solver alone"
    started = time.perf_counter()
    answers = system.answer(
        rows,
        mode="text" if method == "text" else "latent",
        rounds=1 if alone else rounds,
        batch_size=BATCH,
        on_message=shuffled if method == "shuffled latents" else None,
    )
    seconds = time.perf_counter() - started
    right = sum(
        METRICS["last_word"](answer.text, str(row["answer"])) for answer, row in zip(answers, rows, strict=True)
    )
    text_tokens = sum(sum(answer.text_tokens.values()) for answer in answers)
    latent_steps = sum(sum(answer.latent_steps.values()) for answer in answers)
    rounds, count = 0 if alone else rounds, len(rows)
    costs = (text_tokens / count, latent_steps / count, seconds / count)
    return Measurement(method, hops, rounds, count, right / count, chance(hops, rounds), *costs)


def _solver_alone(system: RecursiveMAS, task: Task) -> RecursiveMAS:
    """The solver with its own sheet, and the question where the critic's message belongs."""
    template = task.prompts["solver"]["first"].replace("{{from:critic}}", "{{question}}")
    return single_agent(system, "solver", template)


def shuffled(visit: Visit, message: Latents | list[str]) -> Latents | list[str]:
    """Every question gets the latents of another one of its batch."""
    if isinstance(message, list):
        return message[1:] + message[:1]
    return Latents(torch.roll(message.states, 1, dims=0), message.lengths)


def summary(cells: Sequence[Measurement]) -> str:
    """Accuracy alone: a line per number of hops, a column per method and rounds."""
    columns = list(dict.fromkeys((cell.method, cell.rounds) for cell in cells))
    reached = {((cell.method, cell.rounds), cell.hops): cell.accuracy for cell in cells}
    titles = [f"{method} r={rounds}" if rounds else method for method, rounds in columns]
    lines = ["accuracy  " + "  ".join(titles)]
    for hops in dict.fromkeys(cell.hops for cell in cells):
        shares = (f"{reached[column, hops]:>{len(title)}.3f}" for column, title in zip(columns, titles, strict=True))
        lines.append(f"{hops} hop{'s' if hops > 1 else ' '}    " + "  ".join(shares))
    return "\n".join(lines)


def heading() -> str:
    """Names of the columns of `line`."""
    names = ("hops", "rounds", "method", "accuracy", "chance", "text tokens", "latent steps", "ms/question")
    return "{:>4} {:>6}  {:<16} {:>8} {:>6} {:>11} {:>12} {:>11}".format(*names)


def line(cell: Measurement) -> str:
    """A cell as a line of text."""
    return (
        f"{cell.hops:>4} {cell.rounds or '-':>6}  {cell.method:<16} {cell.accuracy:>8.3f} {cell.chance:>6.3f} "
        f"{cell.text_tokens:>11.1f} {cell.latent_steps:>12.1f} {cell.seconds * 1e3:>11.2f}"
    )
