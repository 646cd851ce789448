"""How much is tried: a fifth in the ordinary tests, all of it with ``RECMAS_TORTURE=1`` (`make torture`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")
FULL = os.environ.get("RECMAS_TORTURE") == "1"
PART = 5


SEED = int(os.environ.get("RECMAS_TORTURE_SEED", "0"))
"""Of what is drawn: the same in every run, unless ``RECMAS_TORTURE_SEED`` says another; a failure names it."""


def amount(full: int) -> int:
    return full if FULL else -(-full // PART)


def some(items: Sequence[Item]) -> list[Item]:
    """All, or every fifth."""
    return list(items) if FULL else list(items)[SEED % PART :: PART]
