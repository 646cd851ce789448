"""What holds of every test process."""

from __future__ import annotations

import gc


def pytest_make_parametrize_id(val: object, argname: str) -> None:
    """All workers must collect the same names. Packed bytes hold the second of their packing, so bytes need an id."""
    if isinstance(val, bytes):
        raise TypeError(f"{argname}: {val[:20]!r} is no name for a test; give it an id")


def pytest_collection_finish() -> None:
    """What was imported until now stays: half a million objects, which no collection need look through again."""
    gc.collect()
    gc.freeze()
