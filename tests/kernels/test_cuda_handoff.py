"""The handoff on a CUDA device: rows are copied exactly, on the current stream, whatever their layout."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from recmas_kernels import use_backend
from recmas_kernels.backends import cuda
from recmas_kernels.backends.call import Call

SLOTS = torch.tensor([7, 0, 3])


@pytest.fixture
def serving():
    """Skips unless the CUDA backend can serve, and forces it."""
    reason = cuda.unavailable()
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    with use_backend("cuda"):
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device makes the backend usable")
def test_unusable_backend_says_why():
    reason = cuda.unavailable()
    built = importlib.util.find_spec("recmas_kernels._cuda") is not None
    assert reason == "torch sees no CUDA device" if built else "recmas_kernels.info" in reason


def test_any_handoff_is_taken():
    call = Call("handoff_fwd", "cuda", torch.float64, 4000, 0, 0, 0, training=False)
    assert cuda.declines(call) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 3, 6, 40, 4096])
def test_rows_are_copied_exactly(serving, dtype, width):
    rows, embeds = torch.randn(3, width, dtype=dtype), torch.randn(9, width, dtype=dtype)
    with use_backend("reference"):
        expected = torch.ops.recmas.handoff_fwd(rows, embeds, SLOTS)
        expected_back = torch.ops.recmas.handoff_bwd(embeds, SLOTS)
    device_embeds, slots = embeds.cuda(), SLOTS.cuda()
    assert torch.equal(torch.ops.recmas.handoff_fwd(rows.cuda(), device_embeds, slots).cpu(), expected)
    assert torch.equal(device_embeds.cpu(), embeds), "handoff_fwd must not write into its input"
    for actual, wanted in zip(torch.ops.recmas.handoff_bwd(device_embeds, slots), expected_back, strict=True):
        assert torch.equal(actual.cpu(), wanted)
    torch.ops.recmas.handoff_(rows.cuda(), device_embeds, slots)
    assert torch.equal(device_embeds.cpu(), expected)


@pytest.mark.gpu
def test_row_strides_and_misaligned_starts(serving):
    wide = torch.randn(3, 20, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(9, 32, device="cuda", dtype=torch.bfloat16)
    torch.ops.recmas.handoff_(wide[:, 1:9], table[:, 3:11], SLOTS.cuda())
    expected = torch.zeros_like(table)
    expected[SLOTS.cuda(), 3:11] = wide[:, 1:9]
    assert torch.equal(table, expected)


@pytest.mark.gpu
def test_work_goes_to_the_current_stream(serving):
    stream = torch.cuda.Stream()
    rows = torch.randn(3, 64, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        embeds = torch.zeros(9, 64, device="cuda")
        out = torch.ops.recmas.handoff_fwd(rows, embeds, SLOTS.cuda())
    stream.synchronize()
    assert torch.equal(out[SLOTS.cuda()], rows)


@pytest.mark.gpu
def test_captured_in_a_graph(serving):
    rows, embeds, slots = torch.randn(3, 64, device="cuda"), torch.zeros(9, 64, device="cuda"), SLOTS.cuda()
    torch.ops.recmas.handoff_(rows, embeds, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.recmas.handoff_(rows, embeds, slots)
    rows.fill_(5.0)
    graph.replay()
    assert torch.equal(embeds[slots], rows)


@pytest.mark.gpu
def test_rows_past_two_gibibytes(serving):
    """64-bit offsets: the slot lies beyond 2^31 bytes and 2^31 elements."""
    table = torch.zeros(2**21 + 2, 1024, device="cuda", dtype=torch.float16)
    rows = torch.ones(1, 1024, device="cuda", dtype=torch.float16)
    torch.ops.recmas.handoff_(rows, table, torch.tensor([2**21 + 1], device="cuda"))
    assert torch.equal(table[-1], rows[0])
    assert not table[:-1].any()
