"""How a time grows: exponents with a free offset, and a whole model of several terms by non-negative least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

EXPONENTS = np.arange(-0.5, 3.0, 0.005)
RESAMPLES = 200
Array = np.ndarray


def non_negative(columns: Array, values: Array) -> tuple[Array, float]:
    """Coefficients >= 0 of ``columns [n, k]`` that fit ``values [n]`` best in relative error, and that error's squares.

    Exact: every subset of the columns is tried, so there may be few of them.
    """
    scaled = columns / values[:, None]
    size = np.abs(scaled).max(axis=0)
    best, least = np.zeros(columns.shape[1]), float(len(values))
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), count)):
            found, *_ = np.linalg.lstsq(scaled[:, chosen] / size[chosen], np.ones(len(values)), rcond=None)
            left = float(np.square(scaled[:, chosen] / size[chosen] @ found - 1).sum())
            if (found >= 0).all() and left < least:
                best, least = np.zeros(columns.shape[1]), left
                best[chosen] = found / size[chosen]
    return best, least


def explained(values: Array, fitted: Array) -> float:
    """R²: the share of the values' variance that a fit explains."""
    return float(1 - np.square(values - fitted).sum() / np.square(values - values.mean()).sum())


@dataclass(frozen=True)
class Power:
    """``offset + factor * size ** exponent``, the exponent with its 95% bootstrap interval."""

    exponent: float
    low: float
    high: float
    offset: float
    r2: float

    @classmethod
    def of(cls, sizes: Sequence[int], samples: Sequence[Sequence[float]], seed: int = 0) -> Power:
        """The fit of each size's median; ``samples`` has a list per size, entry i of each of the same round."""
        times, x = np.asarray(samples), np.asarray(sizes, dtype=float)
        exponent, offset, factor = _power(x, np.median(times, axis=1))
        rounds = np.random.default_rng(seed).integers(0, times.shape[1], size=(RESAMPLES, times.shape[1]))
        again = [_power(x, np.median(times[:, chosen], axis=1))[0] for chosen in rounds]
        low, high = np.percentile(again, [2.5, 97.5])
        r2 = explained(np.median(times, axis=1), offset + factor * x**exponent)
        return cls(float(exponent), float(low), float(high), float(offset), r2)


def _power(x: Array, times: Array) -> tuple[float, float, float]:
    """Exponent, offset and factor of the best fit in relative error."""
    grown = (x / x.max())[:, None] ** EXPONENTS[None, :]
    weight = 1 / times**2
    total = weight.sum()
    mean_x, mean_t = (weight @ grown) / total, (weight @ times) / total
    spread = (weight[:, None] * (grown - mean_x) ** 2).sum(axis=0)
    slope = (weight[:, None] * (grown - mean_x) * (times - mean_t)[:, None]).sum(axis=0) / np.maximum(spread, 1e-30)
    offset = mean_t - slope * mean_x
    alone = (weight @ (grown * times[:, None])) / (weight @ grown**2)  # where the best offset would be negative
    slope, offset = np.where(offset < 0, alone, slope), np.maximum(offset, 0)
    left = (weight[:, None] * (offset + slope * grown - times[:, None]) ** 2).sum(axis=0)
    best = int(np.argmin(np.where(slope > 0, left, np.inf)))
    return EXPONENTS[best], offset[best], slope[best] / x.max() ** EXPONENTS[best]


@dataclass(frozen=True)
class Term:
    """A term of a whole model: its coefficient with the 95% bootstrap interval."""

    name: str
    coefficient: float
    low: float
    high: float


def whole(names: Sequence[str], columns: Array, samples: Sequence[Sequence[float]]) -> tuple[list[Term], float]:
    """Non-negative coefficients of every term over all points, and R²; samples as `Power.of` takes them."""
    times = np.asarray(samples)
    found, _ = non_negative(columns, np.median(times, axis=1))
    rounds = np.random.default_rng(0).integers(0, times.shape[1], size=(RESAMPLES, times.shape[1]))
    again = np.array([non_negative(columns, np.median(times[:, chosen], axis=1))[0] for chosen in rounds])
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    terms = [Term(*row) for row in zip(names, found.tolist(), low.tolist(), high.tolist(), strict=True)]
    return terms, explained(np.median(times, axis=1), columns @ found)
