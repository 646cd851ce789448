"""A device that disappears while a system runs: one line that names it, wherever it happens."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.devices.failure import DeviceError, failure, named
from tests.runtime.fake_graphs import LOST, FakeGraph, FakeGraphs
from tests.runtime.tiny import tiny_agent

GONE = torch.device("meta:1")
LINE = "CUDA error: unspecified launch failure"


@pytest.fixture
def fake(monkeypatch):
    with FakeGraphs(monkeypatch) as devices:
        yield devices


@pytest.mark.parametrize("when", ["message", "step", "capture", "replay"])
@pytest.mark.filterwarnings("ignore:steps go on without CUDA graphs")
def test_a_device_that_disappears_is_named_with_its_agent(fake, monkeypatch, when):
    """While it is sent a message, as it begins to read, as its step is captured or replayed (nobody else's is)."""
    agents = {role: tiny_agent("llama", role, 32, seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=1, latent_steps=3, seed=0)
    mas.to({"critic": GONE})
    mas.answer(["fox"], max_new_tokens=2)  # a bucket is captured when it is used again
    owner, name = {
        "message": (mas, "prompt"),
        "step": (mas.agents["critic"], "think"),
        "capture": (torch.cuda, "graph_pool_handle"),
        "replay": (FakeGraph, "replay"),
    }[when]
    real = getattr(owner, name)

    def disappear(*given, **options):
        fake.lost = GONE
        return real(*given, **options)

    monkeypatch.setattr(owner, name, disappear)
    with pytest.raises(DeviceError) as raised:
        mas.answer(["fox"], max_new_tokens=2)
    assert str(raised.value) == f"agent 'critic' on meta:1: {LINE}"
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.AcceleratorError(LOST), LINE),
        (RuntimeError("link_forward 2 x 8 -> 16 -> 8 on cuda:0: CUDA error 719 (cudaErrorLaunchFailure)"), "719"),
        (RuntimeError("link_fwd on cuda:0, 3 x 40 in float32: Triton Error [CUDA]: unknown error"), "unknown error"),
        (RuntimeError("HIP error: unspecified launch failure"), "HIP error"),
        (DeviceError("training links on cuda:0: x"), "training links on cuda:0: x"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nmore"), ""),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), ""),
        (RuntimeError("x: CUDA error 1 (cudaErrorInvalidValue)"), ""),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), ""),
        (RuntimeError("an error of ours\nCUDA error: unspecified launch failure"), ""),
        (ValueError(LINE), ""),
        (RuntimeError(), ""),
    ],
    ids=str,
)
def test_what_is_the_failure_of_a_device(error, line):
    """Neither a wrong call nor a wrong kernel, which is a mistake of recmas."""
    assert line in failure(error) if line else failure(error) == ""


def test_the_agent_nearest_to_the_failure_is_named():
    devices = [torch.device("cuda:1"), torch.device("cuda:0"), torch.device("cuda:1")]
    wanted = "^inner on cuda:0, cuda:1: HIP error$"
    with pytest.raises(DeviceError, match=wanted), named("outer"), named("inner", *devices):
        raise RuntimeError("HIP error")
