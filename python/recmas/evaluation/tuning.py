"""Rounds, latent steps and pattern by validation under a budget of seconds or tokens: successive halving.

All candidates answer a few questions; the better half goes on to twice as many, until one is left, or the questions or
the budget are used up. A candidate is judged by all questions it has answered. A pattern comes with links and prompts
of its own, so patterns are tried as systems beside each other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from recmas.answering.options import AnswerOptions
from recmas.evaluation.answerer import numbered
from recmas.evaluation.data import expected_answers
from recmas.evaluation.intervals import wilson
from recmas.evaluation.metrics import METRICS, check_metric
from recmas.evaluation.records import UNITS, Cell
from recmas.evaluation.summary import Estimate
from recmas.prompts.rows import Fields
from recmas.recursive_mas import RecursiveMAS

FIRST = 8
"""Questions of the first rung."""


@dataclass
class Trial:
    """One candidate and how it did.

    Attributes:
        cell: mode, rounds and latent steps.
        system: its name, where several systems are tried.
        correct: verdicts by question, in the order they were asked; none where the seconds ended before its turn.
        spent: seconds.
        tokens: text tokens and latent steps of all agents.
        unit: of the budget, in which cost decides between equals.
        rungs: how many it took part in.
    """

    cell: Cell
    system: str = ""
    unit: str = "seconds"
    correct: list[bool] = field(default_factory=list)
    spent: float = 0.0
    tokens: int = 0
    rungs: int = 0

    @property
    def seconds(self) -> float:
        return self.spent / max(1, len(self.correct))

    @property
    def accuracy(self) -> Estimate:
        right, asked = sum(self.correct), len(self.correct)
        return Estimate(right / max(1, asked), *wilson(right, asked))

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better: wrong answers, then the cost of a question."""
        return -self.accuracy.value, self.cost / max(1, len(self.correct))

    @property
    def cost(self) -> float:
        """What it has used up of the budget."""
        return self.spent if self.unit == "seconds" else self.tokens


@dataclass(frozen=True)
class Tuned:
    """What a search found: trials from best to worst, the seconds and tokens it took, and why it ended."""

    trials: list[Trial]
    seconds: float
    tokens: int
    ended: str

    @property
    def best(self) -> Cell:
        return self.trials[0].cell


def tune(
    system: RecursiveMAS | Mapping[str, RecursiveMAS],
    rows: Sequence[Fields],
    budget: float,
    *,
    unit: str = "seconds",
    metric: str = "exact",
    answer_field: str = "answer",
    modes: Sequence[str] = ("latent",),
    rounds: Sequence[int] = (1, 2, 3),
    latent_steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
    options: AnswerOptions | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    **changes: Any,
) -> Tuned:
    """Search modes x rounds x latent steps on validation questions, which should be none of the test's.

    Args:
        system: what is tuned; it is not changed. Or several systems by name, such as of several patterns; one without
            links is tried in texts alone.
        rows: validation questions with answers, asked in an order drawn from `seed`.
        budget: what may be used up; no trial begins later. Of seconds, one answer before the first trial takes some.
        unit: of the budget, one of `UNITS`.
        metric: name of one of `METRICS`.
        answer_field: field of the row that holds the answer.
        modes: "latent" and "text"; a text system is tried once per number of rounds.
        rounds: what is tried; those whose links are missing are an error.
        latent_steps: what is tried, too.
        seed: of the order of the questions.
        options: how questions are answered, but for what is searched; answers are greedy.
        progress: show a bar where stderr is a terminal.
        clock: seconds.
        changes: fields of `AnswerOptions`, in place of those of `options`.

    Raises:
        ValueError: before any model runs: no candidates, rows that lack something, or links that are missing; after the
            first trial, a budget that it has used up.
    """
    check_metric(metric)
    if unit not in UNITS:
        raise ValueError(f"unit: {unit!r} is not one of {', '.join(UNITS)}")
    if not budget > 0:
        raise ValueError(f"budget: {budget} {unit}, expected more than 0")
    systems = system if isinstance(system, Mapping) else {"": system}
    expected = expected_answers(rows, answer_field)
    options = replace(AnswerOptions.of(options, **changes), temperature=0.0, tools=())
    cells = [
        Cell(mode, count, steps if mode == "latent" else 0)
        for mode, count, steps in product(modes, rounds, latent_steps)
    ]
    if not cells or not systems:
        raise ValueError("system, modes, rounds, latent_steps: expected at least one of each")
    trials = []
    for name, one in systems.items():
        fitting = [cell for cell in dict.fromkeys(cells) if cell.mode == "text" or len(systems) == 1 or one.outer_links]
        if not fitting:
            raise ValueError(f"modes: {name} has no links, so it can be tried in mode 'text' only")
        trials += [Trial(cell, name, unit) for cell in fitting]
    for trial in trials:
        systems[trial.system].check(rows, _asked(options, trial.cell))
    order = list(range(len(rows)))
    random.Random(f"tune/{seed}").shuffle(order)
    started, count, going, ended = clock(), min(FIRST, len(rows)), trials, ""

    def used() -> float:
        return clock() - started if unit == "seconds" else sum(trial.tokens for trial in trials)

    with tqdm(total=budget, desc="tune", unit=unit, disable=None if progress else True, leave=False) as bar:
        if unit == "seconds":  # the first answer of a process takes longer than others, and cost decides between equals
            with numbered(order[:1], len(rows)):
                systems[trials[0].system].answer([rows[order[0]]], _asked(options, trials[0].cell))
        while not ended:
            for trial in going:
                first = not trials[0].rungs
                if not first and used() >= budget:
                    ended = f"the {unit} were used up"
                    break
                numbers = order[len(trial.correct) : count]
                began, before = clock(), used()
                with numbered(numbers, len(rows)):
                    answers = systems[trial.system].answer(
                        [rows[number] for number in numbers], _asked(options, trial.cell)
                    )
                trial.spent += clock() - began
                trial.tokens += sum(
                    sum(answer.text_tokens.values()) + sum(answer.latent_steps.values()) for answer in answers
                )
                trial.correct += [
                    METRICS[metric](answer.text, expected[number])
                    for answer, number in zip(answers, numbers, strict=True)
                ]
                trial.rungs += 1
                bar.update(used() - before)
                if first and used() >= budget:
                    raise ValueError(
                        f"budget: {budget:g} {unit} are too few: the first trial, of {count} questions, ended after "
                        f"{used():.{1 if unit == 'seconds' else 0}f} {unit}"
                    )
            if not ended:
                if len(going) == 1 or count == len(rows):
                    ended = "one candidate was left" if len(going) == 1 else "all questions were asked"
                going = sorted(going, key=lambda trial: trial.rank)[: (len(going) + 1) // 2]
                count = min(2 * count, len(rows))
    # Each rung asks the best of the rung before first: whoever a cut left out was no better by then.
    ranked = sorted(trials, key=lambda trial: (-trial.rungs, *trial.rank))
    return Tuned(ranked, clock() - started, sum(trial.tokens for trial in trials), ended)


def _asked(options: AnswerOptions, cell: Cell) -> AnswerOptions:
    return replace(options, mode=cell.mode, rounds=cell.rounds, latent_steps=cell.steps)
