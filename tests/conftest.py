"""What holds of every test process."""

from __future__ import annotations

import gc
import os
import signal

import pytest

import tests.uncollected
import tests.unsynced  # noqa: F401

# Read when torch is loaded. Threads that wait for each other would spin, on processors that another worker needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that runs tests in its background has SIGINT ignored; tests of signals send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes ten seconds and more begins first, or one worker would wait for the other's at the end.
LONG = (
    "tests/install/",
    "tests/kernels/triton/test_interpreter.py",
    "tests/runtime/distributed/",
    "tests/runtime/training/test_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_make_parametrize_id(val: object, argname: str) -> None:
    """All workers must collect the same names. Packed bytes hold the second of their packing, so bytes need an id."""
    if isinstance(val, bytes):
        raise TypeError(f"{argname}: {val[:20]!r} is no name for a test; give it an id")


def pytest_collection_finish() -> None:
    """What was imported until now stays: half a million objects, which no collection need look through again."""
    gc.freeze()
    # Models are thousands of objects, none of them garbage: by default the looks for it take a tenth of all time.
    gc.set_threshold(20_000)
    gc.enable()
