"""What holds of every test process."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What was imported until now stays: half a million objects, which no collection need look through again."""
    gc.collect()
    gc.freeze()
