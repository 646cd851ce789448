"""What ending each question's rounds by itself costs and saves: `settle` against fixed numbers of rounds, by turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.labs import Measured
from recmas import RecursiveMAS
from recmas.answering.options import SETTLED

MOST = 4
"""Rounds that settling may take: one more than the longest question needs, since it takes one to see that it has."""
LEAST = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
"""Cosines of latents."""
WAYS: tuple[dict[str, Any], ...] = (
    *({"mode": mode, "rounds": rounds, "settle": None} for mode in ("latent", "text") for rounds in range(1, MOST + 1)),
    *({"mode": "latent", "rounds": MOST, "settle": least} for least in LEAST),
    {"mode": "text", "rounds": MOST, "settle": 1.0},
)


def measure(system: RecursiveMAS, count: int, turns: int, split: str = "test") -> Measured:
    """A cell per way: which questions were right, how many rounds each took, tokens, steps, and seconds per turn."""
    rows = asked(count, split)
    cells: list[dict[str, Any]] = [{**way, "seconds": []} for way in WAYS]
    for turn in range(turns + 1):
        for way, cell in zip(WAYS, cells, strict=True):
            started = time.perf_counter()
            answers = system.answer(rows, **way, batch_size=BATCH)
            spent = time.perf_counter() - started
            if turn:  # the first one warms up
                cell["seconds"].append(round(spent / count, 7))
                continue
            cell["took"] = [answer.rounds for answer in answers]
            cell["text_tokens"] = sum(sum(answer.text_tokens.values()) for answer in answers) / count
            cell["latent_steps"] = sum(sum(answer.latent_steps.values()) for answer in answers) / count
            cell["correct"] = right(answers, rows)
    return heading(count) | {"split": split, "batch": BATCH}, cells


SHOWN = (("latent", 2, None), ("latent", 3, None), ("latent", MOST, None), ("latent", MOST, SETTLED))
SHOWN_TEXT = (("text", 3, None), ("text", MOST, None), ("text", MOST, 1.0))


def page(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the table in docs/how-to/ask.md."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in record["cells"]:
        cells.setdefault((one["mode"], one["rounds"], one["settle"]), []).append(one)
    yield "| mode | rounds | accuracy | rounds taken | latent steps | text tokens | ms |"
    yield "|---|---|---|---|---|---|---|"
    for mode, rounds, settle in (*SHOWN, *SHOWN_TEXT):
        of_way = cells[mode, rounds, settle]
        share, took = (fmean(fmean(cell[part]) for cell in of_way) for part in ("correct", "took"))
        asked_for = str(rounds) if settle is None else f"at most {rounds}, `settle={settle}`"
        steps, tokens = (fmean(cell[part] for cell in of_way) for part in ("latent_steps", "text_tokens"))
        costs = f"{steps:.1f} | {tokens:.1f} | {1000 * median(one for cell in of_way for one in cell['seconds']):.2f}"
        yield f"| {mode} | {asked_for} | {share:.3f} | {took:.2f} | {costs} |"
