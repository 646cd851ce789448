"""How much is tried: a fifth in the ordinary tests, all of it with ``RECMAS_TORTURE=1`` (`make torture`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
FULL = os.environ.get("RECMAS_TORTURE") == "1"
PART = 5


def _seed() -> int:
    """What ``RECMAS_TORTURE_SEED`` says, else of the commit: the same tests are the same until something changes."""
    if (given := os.environ.get("RECMAS_TORTURE_SEED")) is not None:
        return int(given)
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(asked.stdout.strip()[:6] or "0", 16)


SEED = _seed()
"""Of what is drawn; a failure names it."""


def amount(full: int) -> int:
    return full if FULL else -(-full // PART)


def some(items: Sequence[Item]) -> list[Item]:
    """All, or every fifth."""
    return list(items) if FULL else list(items)[SEED % PART :: PART]
