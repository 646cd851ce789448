"""The backends under test: every one that this machine can run, each a counted skip where it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from recmas_kernels import use_backend
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.choice import refusal


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend that serves CPU tensors, by name: a named backend never falls back."""
    reason = refusal(request.param, Call("handoff_fwd", "cpu", torch.float32, 1, 8, 0, 8, training=False))
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile as in a new process: it compiles one function, such as a module's forward, eight times at most."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
