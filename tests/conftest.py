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

# Tests of signals send them. A shell that runs tests in its background ignores SIGINT, and nohup SIGHUP.
for _ignored, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, _usual)

# Builds, clusters, and Triton's kernels compiled or interpreted: `make test-slow`.
SLOW = (
    "tests/benchmarks/test_gpu_bench.py",
    "tests/install/",
    "tests/kernels/test_processors.py",
    "tests/kernels/triton/test_compiled.py",
    "tests/kernels/triton/test_interpreter.py",
    "tests/runtime/distributed/",
    "tests/runtime/training/test_processes.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")
    # First, or one worker would wait for another's at the end.
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


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
