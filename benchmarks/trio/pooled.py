"""Several link seeds on the same questions: a mean, and an interval over seeds and questions both.

The value of seed s and question q is taken as a mean plus an effect of the seed, one of the question, and a rest. The
variance of the mean over all is then at most that of the seeds' means over their number, plus that of the questions'
means over theirs (the rest counts in both, so the interval errs on the wide side). Its freedom is Satterthwaite's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from recmas.evaluation.intervals import Z95, student


def crossed(values: Sequence[Sequence[float]], z: float = Z95) -> tuple[float, float, float]:
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
