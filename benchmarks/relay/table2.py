"""Table 2 in small: the same questions in 1, 2 and 3 rounds, latents against text, by turns."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.labs import Measured
from recmas import RecursiveMAS

MODES, ROUNDS = ("text", "latent"), (1, 2, 3)


def measure(system: RecursiveMAS, count: int, turns: int) -> Measured:
    """A cell per mode and number of rounds: which questions were right, tokens and steps of each, seconds per turn.

    Every turn runs all cells once, so that what disturbs one disturbs the others; one turn more warms up.
    """
    rows = asked(count)
    cells: list[dict[str, Any]] = [
        {"mode": mode, "rounds": rounds, "seconds": []} for rounds, mode in product(ROUNDS, MODES)
    ]
    for turn in range(turns + 1):
        for cell in cells:
            started = time.perf_counter()
            answers = system.answer(rows, mode=cell["mode"], rounds=cell["rounds"], batch_size=BATCH)
            spent = time.perf_counter() - started
            if turn:
                cell["seconds"].append(round(spent / count, 7))
                continue
            cell["text_tokens"] = sum(sum(answer.text_tokens.values()) for answer in answers) / count
            cell["latent_steps"] = sum(sum(answer.latent_steps.values()) for answer in answers) / count
            cell["correct"] = right(answers, rows)
    return heading(count) | {"batch": BATCH}, cells
