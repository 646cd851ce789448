"""Fixtures of the GPU suites: the order of importance, the time budget, and the file that results go to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from benchmarks.harness.gpu import cuda
from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.gpu.session import Session

_SESSION = pytest.StashKey[Session]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most important cells first; whatever the budget cuts off then matters least."""
    if (step := config.getoption("step")) is not None:
        from benchmarks.gpu.cells import cells  # imports the suites

        wanted = {case.id for _, case in cells(step)}
        items[:] = [item for item in items if _case_id(item) in wanted]
    items.sort(key=_rank)


def _case_id(item: pytest.Item) -> str | None:
    call = getattr(item, "callspec", None)
    return getattr(call.params.get("case"), "id", None) if call is not None else None


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
