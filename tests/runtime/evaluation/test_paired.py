"""Paired differences: exact values, coverage and power by simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from recmas.evaluation.intervals import student
from recmas.evaluation.paired import (
    ERROR,
    Difference,
    detectable_mean,
    detectable_share,
    mcnemar,
    paired_means,
    paired_shares,
)

TRIALS = 2000


def draw(rng, questions, lost, won):
    """Pairs of verdicts: a question is lost or won with these chances, else both verdicts are one fair coin."""
    first, second = [], []
    for _ in range(questions):
        chance, both = rng.random(), rng.random() < 0.5
        first.append(chance < lost or (chance >= lost + won and both))
        second.append(lost <= chance < lost + won or (chance >= lost + won and both))
    return first, second


def test_mcnemar_is_exact():
    assert mcnemar(0, 7) == mcnemar(7, 0) == 2 / 2**7 <= ERROR < mcnemar(0, 6)
    assert mcnemar(3, 10) == pytest.approx(2 * (1 + 13 + 78 + 286) / 2**13)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.05, 0.05), (0.3, 0.1), (0.02, 0.4), (0.9, 0.0)])
def test_the_interval_of_shares_covers(lost, won):
    rng = random.Random(f"{lost}/{won}")
    covered = 0
    for _ in range(TRIALS):
        found = paired_shares(*draw(rng, 40, lost, won))
        assert -1 <= found.low <= found.value <= found.high <= 1
        covered += found.low <= won - lost <= found.high
    assert covered / TRIALS > 0.95  # score intervals hold with 97.5 % on average, with less at shares near 0 or 1


def test_the_interval_of_shares_turns_with_its_arguments():
    first, second = draw(random.Random(0), 50, 0.3, 0.1)
    there, back = paired_shares(first, second), paired_shares(second, first)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.p == back.p
    alike = paired_shares(first, first)
    assert alike.value == 0
    assert alike.low < 0 < alike.high


def test_pairs_count_for_more_than_shares():
    """Ten questions lost of 100 and none won: shown, though the two shares' own intervals overlap widely."""
    first, second = [True] * 50 + [False] * 50, [True] * 40 + [False] * 60
    apart = [True] * 20 + [False] * 40 + [True] * 20 + [False] * 20
    assert paired_shares(first, second).shown
    assert not paired_shares(first, apart).shown
    pairs, shares = paired_shares(first, second), paired_shares(first, apart)
    assert pairs.high - pairs.low < 0.6 * (shares.high - shares.low)


def test_the_interval_of_means():
    rng = random.Random(3)
    first = [rng.gauss(0, 5) for _ in range(400)]
    second = [x + rng.gauss(1, 2) for x in first]
    found = paired_means(first, second, 0)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    half = 2.2414 * statistics.stdev(differences) / 20
    assert found.value == pytest.approx(statistics.mean(differences))
    assert found.low == pytest.approx(found.value - half, abs=0.05 * 2 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.05 * 2 * half)
    assert found.shown
    assert found == paired_means(first, second, 0) != paired_means(first, second, 1)


@pytest.mark.parametrize("questions", [7, 15, 40])
def test_the_interval_of_means_covers_with_few_questions(monkeypatch, questions):
    monkeypatch.setattr("recmas.evaluation.paired.RESAMPLES", 2000)
    rng, missed, trials = random.Random(questions), 0, 600
    for trial in range(trials):
        found = paired_means([0.0] * questions, [rng.gauss(0, 1) for _ in range(questions)], trial)
        missed += found.shown
    assert missed / trials < ERROR + 4 * math.sqrt(ERROR / trials)  # 0.09 of seven, by percentiles as they are


def test_the_interval_of_means_is_as_wide_as_students():
    normal = statistics.NormalDist()
    drawn = [1 + normal.inv_cdf((place + 0.5) / 15) for place in range(15)]  # a normal sample without chance
    found = [paired_means([0.0] * 15, drawn, seed) for seed in range(8)]
    half, error = statistics.mean((one.high - one.low) / 2 for one in found), statistics.stdev(drawn) / 15**0.5
    assert half == pytest.approx(2.5096 * error, rel=0.015)
    assert detectable_mean(drawn) == pytest.approx((2.5096 + 0.8416) * error, rel=1e-3)


@pytest.mark.parametrize(("freedom", "quantile"), [(6, 2.9687), (14, 2.5096), (49, 2.3124), (511, 2.2482)])
def test_students_quantiles(freedom, quantile):
    assert student(statistics.NormalDist().inv_cdf(1 - ERROR / 2), freedom) == pytest.approx(quantile, abs=0.005)


@pytest.mark.parametrize(("questions", "changed"), [(60, 0), (200, 40), (400, 300)])
def test_a_detectable_difference_of_shares_is_detected_four_times_of_five(questions, changed):
    least = detectable_share(questions, changed)
    c = max(changed / questions, least)
    needed = 2.2414 * c**0.5 + 0.8416 * (c - least**2) ** 0.5
    assert least == pytest.approx(needed / questions**0.5, rel=1e-4)
    rng, shown = random.Random(questions), 0
    for _ in range(TRIALS):
        found = paired_shares(*draw(rng, questions, (c + least) / 2, (c - least) / 2))
        shown += found.shown
    assert 0.7 < shown / TRIALS < 0.87  # the exact test is a little more careful than the normal formula
    assert detectable_share(4 * questions, 4 * changed) < least


def test_a_detectable_mean_is_detected_four_times_of_five():
    rng, shown = random.Random(5), 0
    least = detectable_mean([rng.gauss(0, 2) for _ in range(5000)]) * (5000 / 50) ** 0.5
    for _ in range(TRIALS):
        drawn = [rng.gauss(least, 2) for _ in range(50)]
        shown += abs(statistics.mean(drawn)) > 2.2414 * statistics.stdev(drawn) / 50**0.5
    assert shown / TRIALS == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / TRIALS))


def test_what_is_shown_and_what_is_shown_to_be_small():
    assert Difference(0.1, 0.05, 0.2, p=0.01).shown
    assert not Difference(0.1, 0.05, 0.2, p=0.03).shown
    assert Difference(0.1, 0.05, 0.2).shown
    assert not Difference(0.1, -0.05, 0.2).shown
    assert Difference(0.01, -0.04, 0.049).within(0.05)
    assert not Difference(0.01, -0.06, 0.02).within(0.05)
    assert not Difference(0.01, -0.04, 0.06).within(0.05)
