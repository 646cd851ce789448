"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from recmas.files.control_groups import contents, groups


def cores(root: Path = Path("/")) -> int:
    """Of this machine: those that the process may run on, or as much time as control groups give it, if less.

    A share of a core counts as one.

    Args:
        root: of the file system, for tests.
    """
    return max(1, min([_scheduled(), *map(math.ceil, _quotas(root))]))


def _scheduled() -> int:
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; it heeds PYTHON_CPU_COUNT, too
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Seconds of processor time per second, of every group that has a bound."""
    for version, folder in groups("cpu", root):
        if version == 2:
            quota, _, period = contents(folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = (contents(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # not "max", not -1
            yield int(quota) / int(period)
