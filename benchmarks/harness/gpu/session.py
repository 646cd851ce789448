"""What all GPU cells of one pytest session share: the time that is left, the device, the file of results."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.gpu import cuda
from benchmarks.harness.gpu.run_file import RunFile
from benchmarks.harness.gpu.schedule import Budget
from benchmarks.harness.machine import git_commit, slug_of, versions
from benchmarks.harness.record import SCHEMA

SETTLE_SECONDS = 2.0  # of arithmetic before the first cell, until the clocks hold


class Session:
    """What all GPU cells of one pytest session share."""

    def __init__(self, config: pytest.Config) -> None:
        self.full = config.getoption("grid") == "full"
        self.budget = Budget(config.getoption("seconds"))
        timed = self.full and cuda.available()
        self.facts = cuda.facts() if timed else None
        self.limits: Any = None
        if self.facts is not None:
            from benchmarks.harness.gpu.limits import GpuLimits  # needs triton, which a machine without a GPU may lack

            self.limits = GpuLimits(self.facts["l2_bytes"])
            cuda.settle(SETTLE_SECONDS)
        path = config.getoption("records")
        self.run = RunFile(Path(path) if path and timed else None, self._head)
        if timed:
            self.run.save()

    def _head(self) -> dict[str, Any]:
        assert self.facts is not None
        return {
            "schema": SCHEMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "grid": "full",
            "git": git_commit(),
            "device": {"kind": "gpu", "slug": slug_of(f"gpu {self.facts['name']}"), **self.facts},
            "versions": versions(),
            "limits": self.limits.measured(),
        }
