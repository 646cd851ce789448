"""The Triton kernels on a real device: what the interpreter cannot show (bfloat16 products, graphs, full sizes)."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from recmas_kernels import LinkConfig, alignment_loss, use_backend
from recmas_kernels.testing import LOW_PRECISION, check_budget, check_link, configs, make_link, make_rows, name_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("triton")

from recmas_kernels.backends.triton import plan  # noqa: E402

CONFIGS = {
    **configs(),
    "small": LinkConfig("inner", 256, 128, 256, "identity"),
    "small-256": LinkConfig("inner", 320, 256, 320, "identity"),
    "small-512": LinkConfig("inner", 256, 512, 256, "identity"),
    "large": LinkConfig("outer", 1544, 1024, 768, "linear"),
}
CASES = [
    (variant, kind)
    for kind, config in CONFIGS.items()
    for variant in (plan.LIBRARY, plan.SMALL)
    if variant != plan.SMALL or (config.residual != "linear" and config.hidden_features <= plan.WIDEST_SMALL)
]


@pytest.fixture(autouse=True)
def on_the_device():
    """Everything made without a device lands on the GPU, the oracle's copies included; only Triton serves."""
    with torch.device("cuda"), use_backend("triton"):
        yield


@pytest.mark.parametrize("tokens", [1, 129, 1000])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_outputs_and_gradients_stay_in_the_error_budget(monkeypatch, variant, kind, dtype, tokens):
    monkeypatch.setattr(plan, "variant", lambda *_: variant)
    with torch.device("cpu"):
        link = make_link(CONFIGS[kind], dtype)
        x = make_rows(tokens, link.config.in_features, dtype=dtype)
        dy = make_rows(tokens, link.config.out_features, dtype=dtype, seed=2)
    first = check_link(link.cuda(), x.cuda(), dy.cuda())
    again = run(link, x.cuda(), dy.cuda())
    assert torch.equal(first.y, again.y)
    assert all(torch.equal(grad, again.grads[name]) for name, grad in first.grads.items())


@pytest.mark.parametrize("variant", [plan.LIBRARY, plan.SMALL])
def test_a_graph_replays_the_link(monkeypatch, variant):
    monkeypatch.setattr(plan, "variant", lambda *_: variant)
    with torch.device("cpu"):
        link = make_link(LinkConfig("inner", 256, 128, 256, "identity"), torch.bfloat16)
        rows = [make_rows(64, 256, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    link, x = link.cuda(), rows[0].cuda()
    with torch.no_grad():
        link(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = link(x)
        x.copy_(rows[1])
        graph.replay()
        assert torch.equal(y, link(x))


def test_a_first_call_inside_a_graph_is_recorded_or_says_what_to_do():
    """In a process of its own: there, no kernel has been loaded, and a spoiled recording spoils nothing else."""
    program = """
        import torch
        from recmas_kernels import FusedRecursiveLink, use_backend
        link, x = FusedRecursiveLink.inner(256, 128).cuda().bfloat16(), torch.randn(64, 256, device="cuda").bfloat16()
        torch.zeros(1, device="cuda").matmul(torch.zeros(1, device="cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), use_backend("triton"):
            with torch.cuda.graph(graph):
                y = link(x)
            graph.replay()
            assert torch.equal(y, link(x)), "recorded, but wrongly"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0 or "make the same call once before recording" in done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("variant", [plan.LIBRARY, plan.SMALL])
def test_tensors_of_a_device_that_is_not_current(monkeypatch, variant):
    monkeypatch.setattr(plan, "variant", lambda *_: variant)
    with torch.device("cpu"):
        link = make_link(LinkConfig("inner", 256, 128, 256, "identity"), torch.bfloat16)
        x = make_rows(64, 256, dtype=torch.bfloat16)
    expected = run(link.cuda(0), x.cuda(0), x.cuda(0)).y
    assert torch.equal(run(link.cuda(1), x.cuda(1), x.cuda(1)).y.cuda(0), expected)


@pytest.mark.parametrize("variant", [plan.LIBRARY, plan.SMALL])
def test_work_runs_on_the_current_stream(monkeypatch, variant):
    """Behind a long wait on a stream of its own, with nothing that orders the default stream after it."""
    monkeypatch.setattr(plan, "variant", lambda *_: variant)
    with torch.device("cpu"):
        link = make_link(LinkConfig("inner", 256, 128, 256, "identity"), torch.bfloat16)
        x = make_rows(64, 256, dtype=torch.bfloat16)
    link, x = link.cuda(), x.cuda()
    with torch.no_grad():
        expected, late = link(x), torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            y = link(late)
        stream.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_alignment_loss_at_full_width(dtype):
    with torch.device("cpu"):
        pred, table = make_rows(257, 2048, dtype=dtype), make_rows(1000, 2048, dtype=dtype, seed=2)
        ids = torch.randint(0, 1000, (257,), generator=torch.Generator().manual_seed(3))
    pred, table, ids = pred.cuda().requires_grad_(), table.cuda(), ids.cuda()

    def loss_and_grad(pred, table):
        loss = alignment_loss(pred, table, token_ids=ids, mse_weight=0.1)
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    fused = loss_and_grad(pred, table)
    with use_backend("reference"):
        exact = loss_and_grad(pred.detach().double().requires_grad_(), table.double())
        eager = loss_and_grad(pred, table)
    check_budget("loss", fused[0], eager[0], exact[0], dtype)
    check_budget("gradient", fused[1], eager[1], exact[1], dtype)
