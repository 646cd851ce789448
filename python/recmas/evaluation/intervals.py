"""How sure a number is: Wilson's interval of a share, Student's quantiles, and the unbiased pass@k."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: float, questions: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, of 95 % unless `z` says otherwise; (0, 1) for no questions.

    `successes` may be the sum of one number in [0, 1] per question (a share of its samples, a pass@k). The variance of
    such numbers is at most that of yes and no with the same mean, so the interval then errs on the wide side, while
    counting every sample as a question of its own would err on the narrow one.
    """
    if questions == 0:
        return 0.0, 1.0
    share, z2 = successes / questions, z * z
    centre = (share + z2 / (2 * questions)) / (1 + z2 / questions)
    half = z / (1 + z2 / questions) * math.sqrt(share * (1 - share) / questions + z2 / (4 * questions**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # rounding never excludes the share


def student(z: float, freedom: float) -> float:
    """What `z` is of the normal distribution, of Student's t; its expansion in 1 / freedom, to 0.01 from 5 on."""
    f = 4 * freedom
    terms = (
        (z**3 + z) / f,
        (5 * z**5 + 16 * z**3 + 3 * z) / (6 * f**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (6 * f**3),
    )
    return z + sum(terms)


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased estimate, from `samples` answers to one question, of the chance that any of `k` is correct.

    ``1 - C(samples - correct, k) / C(samples, k)``: the share of all choices of k samples that hold a correct one.

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct in {samples}: expected 1 <= k <= samples >= correct >= 0")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
