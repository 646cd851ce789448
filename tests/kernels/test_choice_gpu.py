"""Asking for a GPU backend that cannot serve: the error names op, device, reason, way out. The GPU is made up."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator

import pytest
import torch

from recmas_kernels import BackendUnavailableError, latent_handoff, use_backend
from recmas_kernels.backends import choice, cuda, native
from recmas_kernels.backends import triton as triton_backend
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.explain import explain_call
from recmas_kernels.testing import configs, make_link, make_rows

CALL = Call("link_fwd", "cuda", torch.bfloat16, 4, 2048, 2048, 2048, training=False)
WAY_OUT = r"; use_backend\('auto'\) chooses one that can$"
GPU_BACKENDS = ("cuda", "triton")


def prefix(name: str, op: str = "link_fwd", device: str = "cuda", dtype: str = "torch.bfloat16") -> str:
    return f"^backend '{name}' cannot serve {op} on {device} in {dtype}: "


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    """What a backend remembers about the machine is forgotten before and after, since the machine changes here."""
    caches = (choice._serving, cuda.unavailable, cuda._native, triton_backend.unavailable)
    for remembered in caches:
        remembered.cache_clear()
    yield
    for remembered in caches:
        remembered.cache_clear()


class FakeGpu:
    """A machine with one GPU, an sm_90 under a CUDA 13 driver, and the module built for it; tests take parts away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.module = types.SimpleNamespace(
            driver_version=lambda: 13000, toolkit_version=13000, architectures="80-real,90-real,90-virtual"
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(native, "load", lambda label: self.module)
        started = types.SimpleNamespace(get_current_target=lambda: None)
        monkeypatch.setattr(importlib.import_module("triton.runtime").driver, "_active", started)
        self.capability(9, 0)

    def capability(self, major: int, minor: int) -> None:
        self._patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    def driver(self, version: int) -> None:
        self.module.driver_version = lambda: version

    def without_driver(self) -> None:
        self._patch.setattr(torch.cuda, "is_available", lambda: False)

    def without_module(self, message: str) -> None:
        def load(label: str) -> types.ModuleType:
            raise ImportError(message)

        self._patch.setattr(native, "load", load)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    pytest.importorskip("triton")
    return FakeGpu(monkeypatch)


def test_the_machine_made_up_here_is_served(gpu: FakeGpu) -> None:
    """Else the tests below would pass for want of it."""
    for name in GPU_BACKENDS:
        with use_backend(name):
            assert choice.choose(CALL) is choice.load(name)
    assert choice.choose(CALL) is cuda


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_cpu_tensor(name: str) -> None:
    link, x = make_link(configs()["inner"]), make_rows(2, 40)
    message = prefix(name, device="cpu", dtype="torch.float32") + "it does not serve cpu tensors" + WAY_OUT
    with use_backend(name), torch.no_grad(), pytest.raises(BackendUnavailableError, match=message):
        link(x)
    with use_backend(name), pytest.raises(BackendUnavailableError, match="cannot serve link_fwd_train on cpu"):
        link(x)
    embeds = make_rows(3, 23)
    link = make_link(configs()["outer"])
    with use_backend("reference"), torch.no_grad():
        mapped = link(x)
    with use_backend(name), torch.no_grad(), pytest.raises(BackendUnavailableError, match="cannot serve handoff_fwd"):
        latent_handoff(x, lambda rows: mapped, embeds, slot_rows=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_an_old_gpu(gpu: FakeGpu, name: str) -> None:
    gpu.capability(7, 5)
    wanted = {
        "cuda": ": the module holds code for 80-real, 90-real, 90-virtual alone",
        "triton": ", expected 8.0 or more",
    }
    message = prefix(name) + "cuda:0 has compute capability 7.5" + wanted[name] + WAY_OUT
    with use_backend(name), pytest.raises(BackendUnavailableError, match=message):
        choice.choose(CALL)
    assert choice.choose(CALL) is choice.load("reference")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "the kernels have no float64"),
        ("triton", "it computes in float32, bfloat16 and float16, not in torch.float64"),
    ],
)
def test_an_unsupported_dtype(gpu: FakeGpu, name: str, reason: str) -> None:
    with use_backend(name), pytest.raises(BackendUnavailableError, match=prefix(name, dtype="torch.float64") + reason):
        choice.choose(CALL._replace(dtype=torch.float64))
    assert choice.choose(CALL._replace(dtype=torch.float64)) is choice.load("reference")


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_missing_driver(gpu: FakeGpu, name: str) -> None:
    gpu.without_driver()
    message = prefix(name) + "torch sees no CUDA device" + WAY_OUT
    with use_backend(name), pytest.raises(BackendUnavailableError, match=message):
        choice.choose(CALL)


def test_a_driver_older_than_the_module(gpu: FakeGpu) -> None:
    gpu.driver(12080)
    message = prefix("cuda") + r"the driver serves CUDA 12\.8, the module was built with CUDA 13\.0" + WAY_OUT
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match=message):
        choice.choose(CALL)
    assert choice.choose(CALL) is triton_backend, "Triton compiles for the driver that is there"


def test_a_failed_build(gpu: FakeGpu) -> None:
    gpu.without_module("No module named 'recmas_kernels._cuda'")
    message = prefix("cuda") + r"No module named .*_cuda' \(python -m recmas_kernels.info says why\)" + WAY_OUT
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match=message):
        choice.choose(CALL)
    assert choice.choose(CALL) is triton_backend


def test_every_backend_refused_by_name_is_explained(gpu: FakeGpu) -> None:
    gpu.capability(6, 1)
    text = explain_call(CALL)
    assert "cuda: cuda:0 has compute capability 6.1" in text
    assert "triton: cuda:0 has compute capability 6.1" in text
    assert "reference: serves this call" in text
    with use_backend("cuda"):
        assert "error: 'cuda' was asked for and does not serve it" in explain_call(CALL)
