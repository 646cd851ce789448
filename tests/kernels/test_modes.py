"""Ways to run a link, on every device: compiled for any number of tokens, under AMP, several times, on threads.

On a GPU a handful of tokens and many are served by different backends, so the counts lie on both sides of that border.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.utils import counters

from recmas_kernels import FusedRecursiveLink, LinkConfig, RecursiveLink
from recmas_kernels.testing import check_budget, configs, eager_twin, make_link, make_rows, run

CONFIGS = {kind: configs()[kind] for kind in ("inner", "outer")}
TOKENS = (3, 8, 40, 700)
USES = 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_compilation_serves_any_number_of_tokens_in_training(device: str, kind: str) -> None:
    link = make_link(CONFIGS[kind]).to(device)
    torch._dynamo.reset()
    compiled, before = torch.compile(link, fullgraph=True, dynamic=True), graphs()
    for tokens in TOKENS:
        x = make_rows(tokens, link.config.in_features).to(device)
        dy = make_rows(tokens, link.config.out_features, seed=2).to(device)
        expected, traced = run(link, x, dy), x.clone().requires_grad_()
        y = compiled(traced)
        grads = torch.autograd.grad(y, (traced, *link.parameters()), dy)
        torch.testing.assert_close(y, expected.y)
        for (name, wanted), grad in zip(expected.grads.items(), grads, strict=True):
            torch.testing.assert_close(grad, wanted, msg=lambda m, n=name, t=tokens: f"{n}, {t} tokens: {m}")
    assert graphs() - before == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_one_compilation_serves_any_number_of_tokens_in_inference(device: str, kind: str, dtype: torch.dtype) -> None:
    link = make_link(CONFIGS[kind], dtype).to(device)
    torch._dynamo.reset()
    compiled, before = torch.compile(link, fullgraph=True, dynamic=True), graphs()
    for tokens in TOKENS:
        x = make_rows(tokens, link.config.in_features, dtype=dtype).to(device)
        torch.testing.assert_close(compiled(x), link(x))
    assert graphs() - before == 1


def gradients(link: RecursiveLink) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in link.named_parameters() if p.grad is not None}


def in_turn(link: RecursiveLink, x: torch.Tensor, uses: int = USES) -> torch.Tensor:
    """``link`` applied to its own results."""
    for _ in range(uses):
        x = link(x)
    return x


@pytest.mark.parametrize("tokens", [5, 100])
def test_uses_of_one_link_in_one_graph_accumulate(device: str, tokens: int) -> None:
    link = make_link(CONFIGS["inner"]).to(device)
    twins = {"eager": eager_twin(link, torch.float32), "truth": eager_twin(link, torch.float64)}
    x = make_rows(tokens, link.config.in_features).to(device)
    in_turn(link, x).square().sum().backward()
    in_turn(twins["eager"], x).square().sum().backward()
    in_turn(twins["truth"], x.double()).square().sum().backward()
    plain, exact = gradients(twins["eager"]), gradients(twins["truth"])
    for name, grad in gradients(link).items():
        check_budget(name, grad, plain[name], exact[name], torch.float32)


@pytest.mark.parametrize("tokens", [5, 100])
def test_micro_batches_add_to_the_gradients(device: str, tokens: int) -> None:
    link = make_link(CONFIGS["outer"]).to(device)
    batches = [make_rows(tokens, link.config.in_features, seed=seed).to(device) for seed in (1, 2)]
    alone = []
    for x in batches:
        link.zero_grad()
        link(x).square().sum().backward()
        alone.append({name: grad.clone() for name, grad in gradients(link).items()})
    link.zero_grad()
    for x in batches:
        link(x).square().sum().backward()
    for name, grad in gradients(link).items():
        assert torch.equal(grad, alone[0][name] + alone[1][name]), name


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_amp_with_a_grad_scaler(device: str, dtype: torch.dtype, tokens: int) -> None:
    """float32 masters under autocast, the loss scaled: gradients within the eager module's budget, in float32."""
    link = make_link(CONFIGS["outer"]).to(device)
    x = make_rows(tokens, link.config.in_features).to(device)
    dy = make_rows(tokens, link.config.out_features, seed=2).to(device)

    def step(module: RecursiveLink) -> dict[str, torch.Tensor]:
        scaler = torch.amp.GradScaler(device, init_scale=2.0**7)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        with torch.autocast(device, dtype=dtype):
            y = module(x)
        scaler.scale((y.float() * dy).sum()).backward()
        scaler.unscale_(optimizer)
        grads = {name: grad.clone() for name, grad in gradients(module).items()}
        scaler.step(optimizer)
        return grads

    truth = run(eager_twin(link, torch.float64), x.double(), dy.double()).grads
    plain = step(eager_twin(link, torch.float32))
    before = [parameter.detach().clone() for parameter in link.parameters()]
    fused = step(link)
    for name, grad in fused.items():
        assert grad.dtype == torch.float32
        check_budget(name, grad, plain[name], truth[name], dtype)
    changed = [not torch.equal(old, new) for old, new in zip(before, link.parameters(), strict=True)]
    assert all(changed), "the optimiser took its step"


@pytest.mark.parametrize("tokens", [5, 100])
def test_backward_on_another_thread(device: str, tokens: int) -> None:
    """A backward that a thread of its own begins, while another runs one of the same link."""
    link = make_link(CONFIGS["outer"]).to(device)
    x = make_rows(tokens, link.config.in_features).to(device)
    dy = make_rows(tokens, link.config.out_features, seed=2).to(device)
    expected = run(link, x, dy).grads
    results: dict[int, dict[str, torch.Tensor]] = {}

    def work(index: int) -> None:
        results[index] = run(link, x, dy).grads

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for grads in results.values():
        for name, grad in expected.items():
            assert torch.equal(grads[name], grad), name


def test_a_graph_kept_for_a_second_backward(device: str) -> None:
    """Nothing that was saved is written to, so that the second backward finds what the first one found."""
    link = make_link(LinkConfig("inner", 64, 64, 64, "identity")).to(device)
    assert isinstance(link, FusedRecursiveLink)
    x = make_rows(9, 64).to(device).requires_grad_()
    y, inputs = link(x), (x, *link.parameters())
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
