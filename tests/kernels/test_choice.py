"""Which backend serves a call, and the errors of asking for one that cannot."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import BackendUnavailableError, use_backend
from recmas_kernels.backends import choice
from recmas_kernels.backends.call import Call
from recmas_kernels.testing import configs, make_link, make_rows

CALL = Call("link_fwd", "cpu", torch.float32, 4, 8, 8, 8, training=False)


def test_a_named_backend_never_falls_back():
    link, x = make_link(configs()["inner"]), make_rows(2, 40)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="does not serve cpu tensors"):
        link(x)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="float64"):
        link.double()(x.double())


def test_an_unknown_backend_is_named(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn': expected one of auto, reference"),
        use_backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("RECMAS_BACKEND", "turbo")
    with pytest.raises(ValueError, match="unknown backend 'turbo'"):
        make_link(configs()["inner"])(make_rows(2, 40))


def test_the_environment_chooses_and_the_context_overrides(monkeypatch):
    monkeypatch.setenv("RECMAS_BACKEND", "reference")
    assert choice.choose(CALL).__name__ == "recmas_kernels.reference"
    with use_backend("auto"):
        assert choice.requested() == "auto"
    assert choice.requested() == "reference"


def test_auto_serves_float64_and_unknown_devices_by_the_reference():
    for call in (CALL._replace(dtype=torch.float64), CALL._replace(device="meta")):
        assert choice.choose(call).__name__ == "recmas_kernels.reference"


def test_a_block_of_another_thread_may_end_first():
    first, second = use_backend("reference"), use_backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choice.requested() == "auto"
    second.__exit__(None, None, None)
