"""Rounds and latent steps by validation under a budget of seconds: successive halving.

All candidates answer a few questions; the better half goes on to twice as many, until one is left, the questions or the
seconds are used up. A candidate is judged by all questions it has answered.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from recmas.answering.options import AnswerOptions
from recmas.evaluation.data import expected_answers
from recmas.evaluation.intervals import wilson
from recmas.evaluation.metrics import METRICS, check_metric
from recmas.evaluation.records import Cell
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
        correct: verdicts by question, in the order they were asked; none where the seconds ended before its turn.
        spent: seconds.
        rungs: how many it took part in.
    """

    cell: Cell
    correct: list[bool] = field(default_factory=list)
    spent: float = 0.0
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
        """Less is better: wrong answers, then seconds."""
        return -self.accuracy.value, self.seconds


@dataclass(frozen=True)
class Tuned:
    """What a search found: trials from best to worst, the seconds it took, and why it ended."""

    trials: list[Trial]
    seconds: float
    ended: str

    @property
    def best(self) -> Cell:
        return self.trials[0].cell


def tune(
    system: RecursiveMAS,
    rows: Sequence[Fields],
    budget: float,
    *,
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
        system: what is tuned; it is not changed.
        rows: validation questions with answers, asked in an order drawn from `seed`.
        budget: seconds, of which one answer before the first trial takes some; no trial begins later.
        metric: name of one of `METRICS`.
        answer_field: field of the row that holds the answer.
        modes: "latent" and "text"; a text system is tried once per number of rounds.
        rounds, latent_steps: what is tried; those whose links are missing are an error.
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
    if not budget > 0:
        raise ValueError(f"budget: {budget} seconds, expected more than 0")
    expected = expected_answers(rows, answer_field)
    options = replace(AnswerOptions.of(options, **changes), temperature=0.0, tools=())
    cells = [
        Cell(mode, count, steps if mode == "latent" else 0)
        for mode, count, steps in product(modes, rounds, latent_steps)
    ]
    trials = [Trial(cell) for cell in dict.fromkeys(cells)]
    if not trials:
        raise ValueError("modes, rounds, latent_steps: expected at least one of each")
    for trial in trials:
        system.check(rows, _asked(options, trial.cell))
    order = list(range(len(rows)))
    random.Random(f"tune/{seed}").shuffle(order)
    started, count, going, ended = clock(), min(FIRST, len(rows)), trials, ""
    with tqdm(total=budget, desc="tune", unit="s", disable=None if progress else True, leave=False) as bar:
        # The first answer of a process takes longer than others, and seconds decide between equals.
        system.answer([rows[order[0]]], _asked(options, trials[0].cell))
        while not ended:
            for trial in going:
                first = not trials[0].rungs
                if not first and clock() - started >= budget:
                    ended = "the seconds were used up"
                    break
                numbers = order[len(trial.correct) : count]
                began = clock()
                answers = system.answer([rows[number] for number in numbers], _asked(options, trial.cell))
                trial.spent += clock() - began
                trial.correct += [
                    METRICS[metric](answer.text, expected[number])
                    for answer, number in zip(answers, numbers, strict=True)
                ]
                trial.rungs += 1
                bar.update(clock() - began)
                if first and (spent := clock() - started) >= budget:
                    raise ValueError(
                        f"budget: {budget:g} seconds are too few: the first trial, of {count} questions, ended after "
                        f"{spent:.1f} seconds"
                    )
            if not ended:
                if len(going) == 1 or count == len(rows):
                    ended = "one candidate was left" if len(going) == 1 else "all questions were asked"
                going = sorted(going, key=lambda trial: trial.rank)[: (len(going) + 1) // 2]
                count = min(2 * count, len(rows))
    # Each rung asks the best of the rung before first: whoever a cut left out was no better by then.
    ranked = sorted(trials, key=lambda trial: (-trial.rungs, *trial.rank))
    return Tuned(ranked, clock() - started, ended)


def _asked(options: AnswerOptions, cell: Cell) -> AnswerOptions:
    return replace(options, mode=cell.mode, rounds=cell.rounds, latent_steps=cell.steps)
