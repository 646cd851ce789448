"""Table 9 in small: the same questions with more and more latent steps."""

from __future__ import annotations

import time

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.labs import Measured
from recmas import RecursiveMAS

STEPS = (0, 1, 2, 3, 4, 8, 16, 32, 48, 64, 80, 96, 112)
"""Of every agent; the paper's Table 9 has 0, 16, 32, ... 128. A message of 128 and as many steps of its receiver do not
fit into the 256 positions of these agents."""
OWN = "own"
"""The system's own steps, 2, 2 and 3, with which its links were trained."""
ROUNDS = 3


def measure(system: RecursiveMAS, count: int) -> Measured:
    """A cell per number of latent steps: which questions were right, and seconds per question."""
    rows = asked(count)
    cells = []
    for steps in (OWN, *STEPS):
        started = time.perf_counter()
        asked_for = None if steps == OWN else steps
        answers = system.answer(rows, rounds=ROUNDS, latent_steps=asked_for, batch_size=BATCH)
        seconds = round((time.perf_counter() - started) / count, 7)
        cells.append({"steps": steps, "seconds": seconds, "correct": right(answers, rows)})
    return heading(count) | {"rounds": ROUNDS}, cells
