"""An audit of a task at some number of latent steps and some length of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.trio.links import NOTES
from recmas import RecursiveMAS
from recmas.evaluation import audit
from recmas.lab import gym
from recmas.lab.notes import questions

METRIC, BATCH = "begins", 24
VALIDATION, TEST = 1, 2
"""Seeds of questions: prompts, links and their settings are chosen on the first, what is reported is on the second."""


def measure(
    system: RecursiveMAS,
    count: int,
    hops: int,
    steps: int,
    tokens: int,
    arms: Sequence[str],
    seed: int = TEST,
    task: str = NOTES,
) -> list[dict[str, Any]]:
    """A record per arm: what was right and what the gold answer cost, question by question.

    Args:
        system: the task's.
        count: questions, of the notes task of both halves by turns.
        hops: of each question.
        steps: m.
        tokens: of a text message.
        arms: beside the trained and the shuffled one.
        seed: of the questions.
        task: whose questions these are, `NOTES` or one of `recmas.lab.gym`.
    """
    system.settings["reader"].decoding.max_new_tokens = tokens
    if task == NOTES:
        rows = questions("test", seed, count, hops=hops)
    else:
        rows = gym.questions(task, "test", seed, count)
    options: dict[str, Any] = {"metric": METRIC, "latent_steps": steps, "batch_size": BATCH, "progress": False}
    found = audit(system, rows, arms=arms, **options)
    return [
        {
            "arm": one.arm,
            "steps": 0 if one.arm in ("text", "no latents") else steps,
            "tokens": tokens if one.arm == "text" else 0,
            "hops": hops,
            "task": task,
            "correct": [outcome.correct for outcome in one.outcomes],
            "nll": [round(outcome.nll, 4) for outcome in one.outcomes],
        }
        for one in found.arms
    ]
