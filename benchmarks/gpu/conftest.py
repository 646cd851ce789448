"""Fixtures of the GPU suites: the order of importance, the time budget, and the file that results go to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from benchmarks.gpu import cuda
from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.run import Run
from benchmarks.gpu.schedule import Budget
from benchmarks.machine import git_commit, slug_of, versions
from benchmarks.record import SCHEMA

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
            from benchmarks.gpu.limits import GpuLimits  # needs triton, which a machine without a GPU may lack

            self.limits = GpuLimits(self.facts["l2_bytes"])
            cuda.settle(SETTLE_SECONDS)
        path = config.getoption("records")
        self.run = Run(Path(path) if path and timed else None, self._head)
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


_SESSION = pytest.StashKey[Session]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The most important cells first; whatever the budget cuts off then matters least."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> float:
    call = getattr(item, "callspec", None)
    return getattr(call.params.get("case"), "rank", 0) if call is not None else 0


@pytest.fixture
def gpu_bench(request: pytest.FixtureRequest) -> Iterator[GpuBench]:
    """Measures where there is a GPU and the full grid was asked for; else runs every variant once, on the CPU."""
    config = request.config
    if _SESSION not in config.stash:
        config.stash[_SESSION] = Session(config)
    session = config.stash[_SESSION]
    if session.full and session.facts is None:
        pytest.skip("the full grid of the GPU suites needs a CUDA device")
    case = request.node.callspec.params["case"]
    refusal = session.budget.refusal(case.seconds)
    if refusal is not None:
        session.run.leave_out(request.node.callspec.id, refusal)
        pytest.skip(refusal)
    device = torch.device("cpu") if session.facts is None else cuda.device()
    with (
        torch._inductor.config.patch({"triton.enable_persistent_tma_matmul": True}),
        torch._functorch.config.patch(donated_buffer=False),  # a backward is recorded, and so runs more than once
        nullcontext() if session.facts is None else cuda.side_stream(),
    ):
        yield GpuBench(session.run, device, session.limits, session.facts)
