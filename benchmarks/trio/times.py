"""Seconds of text and latent turns on the same questions, by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.trio.cells import TEST
from recmas import RecursiveMAS
from recmas.lab.notes import questions

FLOAT32 = "float32"
"""What models are computed in wherever they are asked questions; times may be of another dtype."""
TURNS: dict[str, dict[str, Any]] = {
    "text, 32 tokens": {"mode": "text", "tokens": 32},
    "text, 8 tokens": {"mode": "text", "tokens": 8},
    "text, 1 token": {"mode": "text", "tokens": 1},
    "latents, m = 32": {"mode": "latent", "latent_steps": 32},
    "latents, m = 8": {"mode": "latent", "latent_steps": 8},
    "latents, m = 1": {"mode": "latent", "latent_steps": 1},
}
"""Those of one position hold the reading of the notes and next to nothing else."""


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
