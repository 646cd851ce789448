"""What is measured on the notes task: audits over latent steps and lengths of texts, and times by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from recmas import RecursiveMAS
from recmas.evaluation import audit
from recmas.lab.notes import questions

METRIC, BATCH = "begins", 24
VALIDATION, TEST = 1, 2
"""Seeds: prompts, links and their settings were chosen on the first, everything reported is on the second."""


class Cell(NamedTuple):
    """An audit: latent steps, tokens of a text message, and arms beside the trained and the shuffled one."""

    steps: int
    tokens: int
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"m={self.steps}, text={self.tokens}: {', '.join(self.arms)}"


CELLS = (
    Cell(8, 32, ("text",)),
    Cell(1, 8, ("text",)),
    Cell(32, 32, ()),
    Cell(4, 32, ()),
    Cell(16, 32, ()),
    Cell(8, 32, ("identity", "random")),
    Cell(8, 32, ("noise", "zeros", "no latents")),
)


def measure(system: RecursiveMAS, cell: Cell, count: int, hops: int) -> list[dict[str, Any]]:
    """A record per arm: what was right and what the gold answer cost, question by question."""
    rows = questions("test", TEST, count, hops=hops)
    system.settings["reader"].decoding.max_new_tokens = cell.tokens
    found = audit(
        system,
        rows,
        metric=METRIC,
        latent_steps=cell.steps,
        batch_size=BATCH,
        arms=cell.arms,
        progress=False,
    )
    return [
        {
            "arm": one.arm,
            "steps": 0 if one.arm in ("text", "no latents") else cell.steps,
            "tokens": cell.tokens if one.arm == "text" else 0,
            "hops": hops,
            "correct": [outcome.correct for outcome in one.outcomes],
            "nll": [round(outcome.nll, 4) for outcome in one.outcomes],
        }
        for one in found.arms
    ]


TURNS: dict[str, dict[str, Any]] = {
    "text, 32 tokens": {"mode": "text", "tokens": 32},
    "text, 8 tokens": {"mode": "text", "tokens": 8},
    "latents, m = 8": {"mode": "latent", "latent_steps": 8},
    "latents, m = 32": {"mode": "latent", "latent_steps": 32},
}


def turns(
    system: RecursiveMAS, count: int, batch_size: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, Any]]:
    """Every way of `TURNS` on the same questions, by turns; a record each: medians of seconds per question.

    Texts are as long as they are said to be: the reader's end-of-text token, which it may write earlier, is counted in
    `tokens`, the mean of what it wrote.
    """
    rows = questions("test", TEST, count)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in TURNS}
    tokens: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, way in TURNS.items():
            system.settings["reader"].decoding.max_new_tokens = way.get("tokens", 0)
            asked = {key: value for key, value in way.items() if key != "tokens"}
            started = clock()
            answers = system.answer(rows, batch_size=batch_size, **asked)
            spent = clock() - started
            tokens[name] = sum(answer.text_tokens.get("reader", 0) for answer in answers) / count
            if turn:  # the first one warms up
                seconds[name].append((spent / count, answers.seconds["round 1, reader"] / count))
    for name, taken in seconds.items():
        whole, reader = (list(part) for part in zip(*taken, strict=True))
        yield {
            "way": name,
            "batch": batch_size,
            "questions": count,
            "tokens": tokens[name],
            "seconds": statistics.median(whole),
            "range": [min(whole), max(whole)],
            "reader seconds": statistics.median(reader),
            "reader range": [min(reader), max(reader)],
        }
