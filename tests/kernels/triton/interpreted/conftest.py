"""Sends CPU tensors through the public functions to the Triton backend, which the dispatch table never does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from recmas_kernels import use_backend
from recmas_kernels.backends import choice
from recmas_kernels.backends.triton import activation, plan, rows
from recmas_kernels.testing import poisoned_allocations

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def triton_serves_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton alone, with NaN in whatever it allocates, and tiles so small that small inputs have several of each."""
    monkeypatch.setitem(choice.ORDER, "cpu", ("triton",))
    monkeypatch.setattr(rows, "PROGRAMS", 3)
    monkeypatch.setattr(activation, "TILE_COLUMNS", 32)
    monkeypatch.setattr(activation, "SUM_BLOCKS", 2)
    monkeypatch.setattr(plan, "small_config", lambda *_, backward: plan.SmallConfig(32, 16, 4, 2))
    with use_backend("triton"), poisoned_allocations():
        yield
