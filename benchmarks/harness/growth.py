"""How one time grows with one size: the record of a fit and what it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.harness.scaling import Power

WITHIN, R2 = 0.1, 0.995  # most that an exponent may differ by, and least R² of its fit
CONSTANT, GROWS = 1.1, 1.25  # from the smallest to the largest size: at most, and at least
BATCH = 4


@dataclass(frozen=True)
class GrowthCase:
    """One size varies.

    Attributes:
        name: of what is timed.
        factor: the size that varies.
        expected: its exponent; 0 says that the time stays.
        small, large: sizes of the quick and of the full grid.
        control: the algorithm that must not stay.
    """

    name: str
    factor: str
    expected: int
    small: tuple[int, ...]
    large: tuple[int, ...]
    control: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.factor}".replace(" ", "-").replace("|", "")


def growth_record(case: GrowthCase, sizes: Sequence[int], samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The record of a fit; `report` draws these in a table of their own.

    Args:
        case: what was timed, over which size.
        sizes: the values of that size.
        samples: seconds per call, a list per size, entry i of each of the same round.
    """
    medians = [float(np.median(times)) for times in samples]
    growth = medians[-1] / medians[0]
    fit = Power.of(sizes, samples) if case.expected else None
    missed = None
    if fit is not None and (abs(fit.exponent - case.expected) > WITHIN or fit.r2 < R2):
        missed = (
            f"exponent {fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}], R² {fit.r2:.4f}, must be {case.expected}"
        )
    elif fit is None and case.control and growth < GROWS:
        missed = f"the control grows {growth:.2f}x, must at least {GROWS:.2f}x"
    elif fit is None and not case.control and growth > CONSTANT:
        missed = f"grows {growth:.2f}x, must at most {CONSTANT:.2f}x"
    return {
        **growth_labels(case.name, case.factor),
        "factor": case.factor,
        "expected": case.expected,
        "control": case.control,
        "sizes": list(sizes),
        "seconds": medians,
        "growth": growth,
        "fit": None if fit is None else asdict(fit),
        "goal": {"within": WITHIN, "r2": R2},
        "missed": missed,
        "samples_us": [[round(value * 1e6, 2) for value in times] for times in samples],
    }


def growth_labels(op: str, shape: str) -> dict[str, Any]:
    """What was timed, in the fields of every record."""
    return {
        "suite": "complexity",
        "op": op,
        "shape": f"over {shape}",
        "dtype": "float32",
        "pass": "forward",
        "tokens": BATCH,
        "cache": "warm",
    }
