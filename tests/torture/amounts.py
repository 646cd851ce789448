"""How much is tried: a fifth in the ordinary tests, all of it with ``RECMAS_TORTURE=1`` (`make torture`)."""

from __future__ import annotations

import os

FULL = os.environ.get("RECMAS_TORTURE") == "1"
SEED = int(os.environ.get("RECMAS_TORTURE_SEED", "0"))
"""Of what is drawn; a failure names it."""


def amount(full: int) -> int:
    return full if FULL else -(-full // 5)
