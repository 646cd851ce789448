"""Two ways of answering the same questions: how much they differ, how sure that is, and what could have been seen.

Intervals hold with 97.5 % each. There are two endpoints, the decision and the NLL of the gold answer, so both intervals
of a comparison hold together with 95 % or more (Bonferroni).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recmas.evaluation.intervals import student, wilson

ERROR = 0.025
"""Of one endpoint: how often its interval misses, and the largest p that counts as a difference."""
POWER = 0.8
_NORMAL = statistics.NormalDist()
_Z = _NORMAL.inv_cdf(1 - ERROR / 2)
_Z_POWER = _NORMAL.inv_cdf(POWER)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        value: second minus first.
        low, high: bounds of its 97.5 % interval.
        p: of the exact test, where there is one.
    """

    value: float
    low: float
    high: float
    p: float | None = None

    @property
    def shown(self) -> bool:
        """Whether it is a difference at all: by the exact test, or else by an interval without 0."""
        return self.p <= ERROR if self.p is not None else not self.low <= 0 <= self.high

    def within(self, margin: float) -> bool:
        """Whether it is shown to be smaller than `margin`: the whole interval is."""
        return -margin < self.low and self.high < margin


def paired_shares(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """How much larger the share of true verdicts is in `second`.

    The interval is Newcombe's for paired proportions (1998, method 10): Wilson's intervals of both shares, joined by
    the correlation of the pairs. The test is McNemar's, exact.
    """
    pairs = list(zip(first, second, strict=True))
    count = len(pairs)
    both, lost = pairs.count((True, True)), pairs.count((True, False))
    won, neither = pairs.count((False, True)), pairs.count((False, False))
    share, other = (both + won) / count, (both + lost) / count
    low, high = wilson(both + won, count, _Z)
    other_low, other_high = wilson(both + lost, count, _Z)
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    product = float(both * neither - lost * won)
    if product > 0:  # his correction for continuity
        product = max(product - count / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(own: float, others: float) -> float:
        return math.sqrt(max(own**2 - 2 * phi * own * others + others**2, 0.0))

    value = share - other
    return Difference(
        value,
        max(-1.0, value - reach(share - low, other_high - other)),
        min(1.0, value + reach(high - share, other - other_low)),
        mcnemar(lost, won),
    )


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of so many changes each way, where either way is as likely."""
    changes = lost + won
    tail = sum(math.comb(changes, k) for k in range(min(lost, won) + 1)) / 2**changes
    return min(1.0, 2 * tail)


def paired_means(first: Sequence[float], second: Sequence[float], seed: int) -> Difference:
    """How much larger the mean of `second` is, with the bootstrap's percentile interval over questions.

    Of few questions that interval is too narrow: it is that of Student's t for normal differences only if its
    percentiles are expanded (Hesterberg 2015), as these are.
    """
    differences = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        differences[torch.randint(len(differences), (RESAMPLES // 10, len(differences)), generator=generator)].mean(1)
        for _ in range(10)
    ]
    means = torch.cat(drawn).sort().values
    count = len(differences)
    outside = int(_NORMAL.cdf(-student(_Z, count - 1) * math.sqrt(count / (count - 1))) * len(means))
    return Difference(differences.mean().item(), means[outside].item(), means[-1 - outside].item())


def detectable_share(questions: int, changed: int) -> float:
    """The smallest true difference of shares that so many questions show with a chance of 80 % (McNemar's test).

    ``(z sqrt(c) + z' sqrt(c - x^2)) / sqrt(n) = x`` for the share c of questions whose verdict changes, which is taken
    as observed, but never less than the difference x itself; 1 where no difference would be shown.

    Args:
        questions: n.
        changed: questions on which the two ways differ.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        share = max(changed / questions, middle)
        needed = _Z * math.sqrt(share) + _Z_POWER * math.sqrt(max(share - middle**2, 0.0))
        low, high = (low, middle) if needed <= middle * math.sqrt(questions) else (middle, high)
    return high


def detectable_mean(differences: Sequence[float]) -> float:
    """The smallest true mean that so many differences show with a chance of 80 %, at the spread of these."""
    return (student(_Z, len(differences) - 1) + _Z_POWER) * statistics.stdev(differences) / math.sqrt(len(differences))
