"""Links in CUDA graphs, on streams, and on the second of two devices; whichever backend serves."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, alignment_loss, latent_handoff
from recmas_kernels.testing import configs, make_link, make_rows, run
from tests.kernels.test_modes import USES, in_turn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPE = torch.bfloat16
KINDS = ("inner", "outer")
TOKENS = (1, 32, 33, 600)  # both sides of the border between few tokens and many


def gpu_link(kind: str, dtype: torch.dtype = DTYPE) -> FusedRecursiveLink:
    return make_link(configs()[kind], dtype).cuda()


def gpu_rows(tokens: int, features: int, seed: int = 1, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return make_rows(tokens, features, dtype=dtype, seed=seed).cuda()


def captured(call):
    """``call`` as a CUDA graph, after two runs of it on a stream of its own, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_inference_replayed_equals_eager_runs(kind, tokens):
    link = gpu_link(kind)
    x = gpu_rows(tokens, link.config.in_features)
    graph, y = captured(lambda: link(x))
    for seed in (3, 4):
        x.copy_(gpu_rows(tokens, link.config.in_features, seed))
        for parameter in link.parameters():
            parameter.mul_(0.9)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, link(x))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_replayed_equal_eager_runs(kind, tokens):
    link = gpu_link(kind)
    names = [name for name, _ in link.named_parameters()]
    x = gpu_rows(tokens, link.config.in_features).requires_grad_()
    dy = gpu_rows(tokens, link.config.out_features, seed=2)

    def step():
        y = link(x)
        return y, torch.autograd.grad(y, (x, *link.parameters()), dy)

    graph, (y, grads) = captured(step)
    for seed in (3, 4):
        with torch.no_grad():
            x.copy_(gpu_rows(tokens, link.config.in_features, seed))
            dy.copy_(gpu_rows(tokens, link.config.out_features, seed + 10))
        graph.replay()
        expected = run(link, x, dy)
        assert torch.equal(y, expected.y)
        for name, grad in zip(("x", *names), grads, strict=True):
            assert torch.equal(grad, expected.grads[name]), name


@pytest.mark.parametrize("tokens", [5, 600])
def test_uses_of_one_link_accumulate_in_one_cuda_graph(tokens):
    link = gpu_link("inner", torch.float32)
    x = gpu_rows(tokens, link.config.in_features, dtype=torch.float32)

    def step():
        link.zero_grad(set_to_none=True)
        in_turn(link, x, USES).square().sum().backward()
        return [parameter.grad for parameter in link.parameters()]

    graph, grads = captured(step)
    x.copy_(gpu_rows(tokens, link.config.in_features, seed=5, dtype=torch.float32))
    graph.replay()
    replayed = [grad.clone() for grad in grads]
    assert all(torch.equal(grad, eager) for grad, eager in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
def test_the_loss_replayed_equals_eager_runs(dtype):
    pred = gpu_rows(65, 256, dtype=dtype).requires_grad_()
    table = gpu_rows(40, 256, seed=2, dtype=dtype)
    ids = torch.arange(65, device="cuda") % 40

    def step():
        loss = alignment_loss(pred, table, token_ids=ids, mse_weight=0.1)
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    graph, (loss, grad) = captured(step)
    with torch.no_grad():
        pred.copy_(gpu_rows(65, 256, seed=3, dtype=dtype))
        ids.copy_(ids.flip(0))
    graph.replay()
    expected = step()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@torch.no_grad()
def test_a_handoff_replayed_equals_an_eager_run():
    link = gpu_link("outer")
    hidden = gpu_rows(48, link.config.in_features)
    slots = torch.arange(3, 51, device="cuda")
    before = gpu_rows(60, link.config.out_features, seed=2)
    embeds = before.clone()
    graph, _ = captured(lambda: latent_handoff(hidden, link, embeds, slot_rows=slots, inplace=True))
    hidden.copy_(gpu_rows(48, link.config.in_features, seed=3))
    embeds.copy_(before)
    graph.replay()
    assert torch.equal(embeds, latent_handoff(hidden, link, before, slot_rows=slots))


@pytest.mark.parametrize("tokens", [5, 600])
def test_backward_follows_the_stream_of_its_forward(tokens):
    """The forward on a stream that is held up, the backward asked for on another: autograd runs it on the first."""
    link = gpu_link("outer")
    x, dy = gpu_rows(tokens, link.config.in_features), gpu_rows(tokens, link.config.out_features, seed=2)
    expected = run(link, x, dy).grads
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    learning = torch.empty_like(x).requires_grad_()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            learning.copy_(x)
        y = link(learning)
    torch.cuda.current_stream().wait_stream(stream)
    grads = torch.autograd.grad(y, (learning, *link.parameters()), dy)
    names = ["x", *(name for name, _ in link.named_parameters())]
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("tokens", [5, 600])
def test_the_second_of_two_devices_while_the_first_is_current(tokens):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    link = make_link(configs()["outer"], DTYPE)
    x = make_rows(tokens, link.config.in_features, dtype=DTYPE)
    dy = make_rows(tokens, link.config.out_features, dtype=DTYPE, seed=2)
    found = {}
    for device in ("cuda:0", "cuda:1"):
        results = run(link.to(device), x.to(device), dy.to(device))
        assert results.y.device == torch.device(device)
        found[device] = [results.y.cpu(), *(grad.cpu() for grad in results.grads.values())]
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
