"""The link op: every kind, backend and dtype against float64, all gradients, any size and stride."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from recmas_kernels import LinkConfig, recursive_link, use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.testing import (
    LOW_PRECISION,
    check_budget,
    check_link,
    configs,
    eager_twin,
    make_link,
    make_rows,
    name_of,
    poisoned_allocations,
    run,
)

CONFIGS = configs()
TOKENS = (0, 1, 7, 129)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients_stay_in_the_error_budget(backend, kind, dtype, tokens):
    config = CONFIGS[kind]
    link = make_link(config, dtype)
    x = make_rows(tokens, config.in_features, dtype=dtype)
    dy = make_rows(tokens, config.out_features, dtype=dtype, seed=2)
    with cpu.fresh_scratch(), poisoned_allocations():
        check_link(link, x, dy)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (123, 40, 8), (40, 1024, 123), (1024, 123, 40)], ids=str)
def test_widths(backend, sizes, dtype):
    config = LinkConfig("outer", *sizes, "linear")
    x, dy = make_rows(7, sizes[0], dtype=dtype), make_rows(7, sizes[2], dtype=dtype, seed=2)
    check_link(make_link(config, dtype), x, dy)


@pytest.mark.parametrize("kind", CONFIGS)
def test_inference_gives_the_training_outputs(backend, kind):
    link = make_link(CONFIGS[kind])
    x = make_rows(7, link.config.in_features)
    training = link(x).detach()
    with torch.no_grad():
        truth, eager = (eager_twin(link, dtype)(x.to(dtype)) for dtype in (torch.float64, torch.float32))
        check_budget("training", training, eager, truth, torch.float32)
        for sighting in ("streamed", "packed on the second sighting", "packed"):
            check_budget(sighting, link(x), eager, truth, torch.float32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradcheck_in_float64(kind):
    """Every element of every Jacobian, so at a quarter of the sizes."""
    config = CONFIGS[kind]
    sizes = {name: getattr(config, name) // 4 for name in ("in_features", "hidden_features", "out_features")}
    link = make_link(replace(config, **sizes), torch.float64)
    x = make_rows(3, link.config.in_features, dtype=torch.float64).requires_grad_()
    parameters = tuple(link.parameters())
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, *parameters: link(x), (x, *parameters))


@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_every_frozen_subset(backend, kind):
    link = make_link(CONFIGS[kind])
    x = make_rows(5, link.config.in_features)
    dy = make_rows(5, link.config.out_features, seed=2)
    full = run(link, x, dy).grads
    names = ["x", *(name for name, _ in link.named_parameters())]
    alone = [{name} for name in names]
    all_but_one = [set(names) - {name} for name in names]
    groups = [set(pair) for pair in itertools.combinations(names, 2)]
    for wanted in (*alone, *all_but_one, *groups):
        for name, parameter in link.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        inputs = x.clone().requires_grad_("x" in wanted)
        link(inputs).backward(dy)
        grads = {"x": inputs.grad, **{name: parameter.grad for name, parameter in link.named_parameters()}}
        for name in names:
            if name in wanted:
                torch.testing.assert_close(
                    grads[name], full[name], rtol=0, atol=0, msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}"
                )
            else:
                assert grads[name] is None, f"{name} has a gradient though only {wanted} were asked for"


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_gradients_of_any_layout(backend, dtype):
    link = make_link(CONFIGS["outer"], dtype)
    tokens, features, out = 6, link.config.in_features, link.config.out_features
    x = make_rows(tokens, features, dtype=dtype)
    wide = make_rows(tokens, 2 * out, dtype=dtype, seed=3)
    layouts = {
        "expanded": torch.ones((), dtype=dtype).expand(tokens, out),
        "row-expanded": make_rows(1, out, dtype=dtype, seed=3).expand(tokens, out),
        "sliced": wide[:, ::2],
        "transposed": make_rows(out, tokens, dtype=dtype, seed=3).t(),
        "offset": wide[:, out:],
    }
    for layout, dy in layouts.items():
        expected, actual = run(link, x, dy.contiguous()).grads, run(link, x, dy).grads
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad, rtol=0, atol=0, msg=lambda m, w=layout: f"{w}: {m}")


def test_inputs_of_any_layout(backend):
    link = make_link(CONFIGS["inner"])
    features = link.config.in_features
    wide = make_rows(6, 2 * features)
    layouts = {
        "every other row": make_rows(12, features)[::2],
        "every other column": wide[:, ::2],
        "transposed": make_rows(features, 6).t(),
        "expanded": make_rows(1, features).expand(6, features),
        "offset": wide[:, features:],
        "last rows of a batch": make_rows(2, 5, features)[:, -3:],
        "one row": make_rows(features),
    }
    for layout, x in layouts.items():
        assert torch.equal(link(x), link(x.contiguous())), layout
        assert link(x).shape == x.shape


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_what_lies_between_rows_is_not_read(backend, dtype):
    """Tiles of a product end at multiples of 32 elements, and rows of 70 do not."""
    link = make_link(LinkConfig("outer", 70, 33, 70, "linear"), dtype)
    x, dy = (torch.full((17, 73), float("nan"), dtype=dtype)[:, :70] for _ in range(2))
    x.copy_(make_rows(17, 70, dtype=dtype))
    dy.copy_(make_rows(17, 70, dtype=dtype, seed=2))
    actual, expected = run(link, x, dy), run(link, x.contiguous(), dy.contiguous())
    assert torch.isfinite(expected.y).all()
    assert torch.equal(actual.y, expected.y)
    for name, grad in expected.grads.items():
        assert torch.equal(actual.grads[name], grad), name


def test_weights_of_any_layout(backend):
    link = make_link(CONFIGS["inner"])
    x = make_rows(3, link.config.in_features)
    w1, w2 = link.proj1.weight.detach(), link.proj2.weight.detach()
    expected = recursive_link(x, w1, w2)
    assert torch.equal(recursive_link(x, w1.t().contiguous().t(), torch.stack([w2, w2], -1)[..., 0]), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_same_inputs_give_the_same_bits(backend, dtype):
    link = make_link(LinkConfig("inner", 123, 123, 123, "identity"), dtype)
    x, dy = make_rows(129, 123, dtype=dtype), make_rows(129, 123, dtype=dtype, seed=2)
    first, second = run(link, x, dy), run(link, x, dy)
    assert torch.equal(first.y, second.y)
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name


def test_nothing_given_is_written_to(backend):
    link = make_link(CONFIGS["outer"])
    x, dy = make_rows(5, link.config.in_features), make_rows(5, link.config.out_features, seed=2)
    before = [t.clone() for t in (x, dy, *link.parameters())]
    run(link, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, dy, *link.parameters()), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(backend, value):
    link = make_link(CONFIGS["inner"])
    x = make_rows(9, link.config.in_features)
    clean = link(x).detach()
    x[4, 3] = value
    spoiled = link(x).detach()
    assert not torch.isfinite(spoiled[4]).any()
    keep = torch.arange(9) != 4
    assert torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_uses_masters(backend, dtype):
    """Arithmetic in autocast's dtype, y in x's dtype, weight gradients in the master's."""
    link = make_link(CONFIGS["outer"])
    for x_dtype in (torch.float32, dtype):
        x = make_rows(7, link.config.in_features).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = link(x)
        y.backward(make_rows(7, link.config.out_features, seed=2).to(y.dtype))
        rounded = eager_twin(link, dtype)
        truth = run(eager_twin(rounded, torch.float64), x.detach().to(dtype).double(), torch.zeros_like(y))
        assert y.dtype == x_dtype
        assert x.grad is not None
        assert x.grad.dtype == x_dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in link.parameters())
        error = (y.detach().double() - truth.y).abs().max() / truth.y.abs().max()
        plain = (rounded(x.detach().to(dtype)).double() - truth.y).abs().max() / truth.y.abs().max()
        assert error <= 2 * plain + torch.finfo(dtype).eps
        link.zero_grad()


def test_weight_gradients_of_masters_are_not_rounded_to_the_compute_dtype(backend):
    link = make_link(LinkConfig("inner", 40, 40, 40, "identity", norm=False))
    x = make_rows(64, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        link(x).float().sum().backward()
    grad = link.proj1.weight.grad
    assert grad is not None
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("kind", ["inner", "outer"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_as_one_graph_for_any_number_of_tokens(kind):
    link = make_link(CONFIGS[kind])
    compiled = torch.compile(link, fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        x = make_rows(tokens, link.config.in_features)
        dy = make_rows(tokens, link.config.out_features, seed=2)
        expected = run(link, x, dy)
        traced_x = x.clone().requires_grad_()
        y = compiled(traced_x)
        assert torch.equal(y, expected.y)
        grads = torch.autograd.grad(y, (traced_x, *link.parameters()), dy)
        for name, grad in zip(expected.grads, grads, strict=True):
            assert torch.equal(grad, expected.grads[name]), name
        with torch.no_grad():
            assert torch.equal(compiled(x), link(x))


def test_one_link_used_several_times_accumulates(backend):
    link = make_link(CONFIGS["inner"])
    x = make_rows(4, link.config.in_features)
    exact, eager = eager_twin(link, torch.float64), eager_twin(link, torch.float32)
    for used in (link, exact, eager):
        used(used(used(x.to(used.proj1.weight.dtype)))).square().sum().backward()
    for name, parameter in link.named_parameters():
        plain, truth = (twin.get_parameter(name).grad for twin in (eager, exact))
        check_budget(name, parameter.grad, plain, truth, torch.float32)
