"""What the record of `benchmarks.lists` says: whether latents of twenty steps do what texts of twenty tokens do."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness.link_seeds import crossed
from benchmarks.harness.timing import Ratio
from benchmarks.lists import timed
from benchmarks.report.claims import FAILS, HOLDS, UNTOLD, Finding, verdict_of
from benchmarks.report.tables import duration

POINT = 0.01
"""Of accuracy: latents that are less than this below text count as good."""


def as_accurate(record: dict[str, Any]) -> Finding:
    """Whether latents answer as many questions as text does, less a point, over all pretrainings and link seeds."""
    systems: dict[tuple[int, int], dict[str, list[int]]] = {}
    for cell in record["answers"]["cells"]:
        systems.setdefault((cell["seed"], cell["link_seed"]), {})[cell["way"]] = cell["correct"]
    means = [_mean([right[way] for right in systems.values()]) for way in ("latent", "text", "shuffled")]
    gains: dict[int, list[list[float]]] = {}
    for (seed, _), right in systems.items():
        gains.setdefault(seed, []).append([b - a for a, b in zip(right["text"], right["latent"], strict=True)])
    # Links of one pretraining err alike, so what is drawn anew is a pretraining: its systems count as one.
    value, low, high = crossed([[*map(statistics.fmean, zip(*each, strict=True))] for each in gains.values()])
    of = f"{len(systems)} systems of {len(gains)} pretrainings, {len(gains[min(gains)][0])} questions each"
    shares = "latents {:.4f}, text {:.4f}, latents of other questions {:.3f}".format(*means)
    told = HOLDS if low > -POINT else FAILS if high < -POINT else UNTOLD
    return Finding(f"{of}: {shares}; latents minus text {value:+.4f} [{low:+.4f}, {high:+.4f}]", told)


def half_the_time(record: dict[str, Any]) -> Finding:
    """Whether latents take at most half of text's seconds per question, beyond chance, in every cell."""
    words, hold = [], []
    for threads, batch, text, latent, terse in timed(record):
        ratio = Ratio.of(latent, text)  # less than 1 where latents take less
        share = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        took = [duration(1e6 * statistics.median(seconds)) for seconds in (latent, text, terse)]
        each = "{} and {} a question, text without unused rows {}".format(*took)
        words.append(f"{batch} at once, {threads} thread{'s' if threads > 1 else ''}: {share} ({each})")
        hold.append(ratio.high <= 0.5)
    return Finding("; ".join(words), verdict_of(hold))


def _mean(systems: list[list[int]]) -> float:
    return statistics.fmean(map(statistics.fmean, systems))
