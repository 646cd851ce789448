"""Several link seeds on the same questions: a mean, and an interval over seeds and questions both.

The value of seed s and question q is taken as a mean plus an effect of the seed, one of the question, and a rest. The
variance of the mean over all is then at most that of the seeds' means over their number, plus that of the questions'
means over theirs (the rest counts in both, so the interval errs on the wide side). Its freedom is Satterthwaite's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from recmas.evaluation.intervals import Z95, student, wilson
from recmas.evaluation.paired import Difference, paired_shares

Z_BOTH = 2.2414027276049464
"""Two-sided 97.5 % of the normal distribution: of differences, whose two endpoints then hold together with 95 %."""
Seeds = Sequence[Sequence[float]]
"""A value of every question, such as whether it was right, by link seed."""


def crossed(values: Seeds, z: float = Z95) -> tuple[float, float, float]:
    """Mean of ``values[seed][question]``, and the bounds of its interval, of 95 % unless ``z`` says otherwise.

    Raises:
        ValueError: fewer than two seeds or questions, or seeds of different questions.
    """
    if len(values) < 2 or len(values[0]) < 2 or len({len(one) for one in values}) > 1:
        raise ValueError(f"expected two seeds and two questions or more, got {[len(one) for one in values]}")
    parts = [
        (statistics.variance(means) / len(means), len(means) - 1)
        for means in ([statistics.fmean(one) for one in sides] for sides in (values, [*zip(*values, strict=True)]))
    ]
    mean = statistics.fmean(map(statistics.fmean, values))
    variance = sum(own for own, _ in parts)
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / sum(own**2 / free for own, free in parts)
    half = student(z, freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


def interval(right: Seeds) -> tuple[float, float, float]:
    """An accuracy and its 95 % interval: Wilson's of one run, over seeds and questions of several."""
    if len(right) == 1:
        return (statistics.fmean(right[0]), *wilson(sum(right[0]), len(right[0])))
    value, low, high = crossed(right)
    return value, max(0.0, low), min(1.0, high)


def change(before: Seeds, after: Seeds) -> Difference:
    """After minus before, question by question; of single runs shares alone. One run is compared with every seed."""
    if len(before) == len(after) == 1:
        return paired_shares([bool(one) for one in before[0]], [bool(one) for one in after[0]])
    count = max(len(before), len(after))
    runs = zip(*(one if len(one) > 1 else [one[0]] * count for one in (before, after)), strict=True)
    return Difference(*crossed([[b - a for a, b in zip(*one, strict=True)] for one in runs], Z_BOTH))
