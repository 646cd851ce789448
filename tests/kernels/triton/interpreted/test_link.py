"""The link in both variants against float64: outputs, every gradient, sizes that divide nothing.

In float32 and float16: the interpreter's bfloat16 products are not to be trusted.
"""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from recmas_kernels import LinkConfig, recursive_link, use_backend
from recmas_kernels.backends.triton import plan
from recmas_kernels.testing import check_budget, check_link, configs, make_link, make_rows, name_of, run

CONFIGS = configs()
VARIANTS = (plan.LIBRARY, plan.SMALL)
SERVED = [
    (variant, kind)
    for variant in VARIANTS
    for kind, config in CONFIGS.items()
    if variant != plan.SMALL or config.residual != "linear"
]


@pytest.fixture
def use(monkeypatch):
    """Forces a variant; it fails if the plan would never name it for the link."""

    def force(name):
        def variant(link):
            assert name in plan.candidates(link)
            return name

        monkeypatch.setattr(plan, "variant", variant)

    return force


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1), (torch.float16, 37)], ids=str)
@pytest.mark.parametrize(("variant", "kind"), SERVED)
def test_outputs_and_gradients_stay_in_the_error_budget(use, variant, kind, dtype, tokens):
    use(variant)
    config = CONFIGS[kind]
    x = make_rows(tokens, config.in_features, dtype=dtype)
    check_link(make_link(config, dtype), x, make_rows(tokens, config.out_features, dtype=dtype, seed=2))


@pytest.mark.parametrize(("variant", "kind"), SERVED)
def test_inference_gives_the_training_outputs(use, variant, kind):
    use(variant)
    link = make_link(CONFIGS[kind])
    x = make_rows(7, link.config.in_features)
    training = link(x).detach()
    with torch.no_grad():
        assert torch.equal(link(x), training)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("kind", ["outer", "outer-equation-4"])
def test_outer_links_with_joined_operands_and_with_two_products(use, monkeypatch, kind, joins):
    use(plan.LIBRARY)
    monkeypatch.setattr(plan, "joins", lambda *_: joins)
    config = CONFIGS[kind]
    check_link(make_link(config), make_rows(37, config.in_features), make_rows(37, config.out_features, seed=2))


def test_gradients_share_no_memory(use):
    """Biases of one sum get it each, whatever is done to the other in place."""
    use(plan.LIBRARY)
    for kind in ("outer", "outer-equation-4"):
        link = make_link(CONFIGS[kind])
        grads = run(link, make_rows(5, link.config.in_features), make_rows(5, link.config.out_features, seed=2)).grads
        places = sorted((grad.data_ptr(), grad.data_ptr() + grad.nbytes) for grad in grads.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places)), kind
        assert torch.equal(grads["proj2.bias"], grads["residual_proj.bias"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_keeps_no_statistics(use, monkeypatch, variant):
    """Zeros for them would be a launch and bytes that nobody reads."""
    use(variant)
    link = make_link(CONFIGS["inner"])
    x = make_rows(5, 40)
    monkeypatch.setattr(torch, "zeros", mock.Mock(wraps=torch.zeros))
    with torch.no_grad():
        link(x)
    assert torch.zeros.call_count == 0
    link(x)
    assert torch.zeros.call_count == 1  # in training there is one for all four rows


@pytest.mark.parametrize(
    ("variant", "kind"),
    [pair for pair in SERVED if pair[1] in ("inner", "outer", "inner-equation-3", "outer-equation-4")],
)
def test_every_frozen_subset(use, variant, kind):
    use(variant)
    link = make_link(CONFIGS[kind])
    x, dy = make_rows(5, link.config.in_features), make_rows(5, link.config.out_features, seed=2)
    full = run(link, x, dy).grads
    for wanted in ({name} for name in full):
        for name, parameter in link.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        inputs = x.clone().requires_grad_("x" in wanted)
        link(inputs).backward(dy)
        grads = {"x": inputs.grad, **{name: parameter.grad for name, parameter in link.named_parameters()}}
        for name in full:
            if name in wanted:
                torch.testing.assert_close(grads[name], full[name], msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}")
            else:
                assert grads[name] is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(use, variant):
    use(variant)
    link = make_link(CONFIGS["inner"])
    results = run(link, make_rows(0, 40), make_rows(0, 40))
    assert results.y.shape == (0, 40)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in results.grads.values())


@pytest.mark.parametrize(("variant", "kind"), [(v, "inner") for v in VARIANTS] + [("library", "outer")])
def test_inputs_of_any_layout(use, variant, kind):
    use(variant)
    link = make_link(CONFIGS[kind])
    features = link.config.in_features
    wide = make_rows(6, 2 * features)
    layouts = {
        "every other row": make_rows(12, features)[::2],
        "expanded": make_rows(1, features).expand(6, features),
        "offset": wide[:, features:],
        "last rows of a batch": make_rows(2, 5, features)[:, -3:],
    }
    dy = make_rows(6, link.config.out_features, seed=2)
    for layout, x in layouts.items():
        shaped = dy.view(*x.shape[:-1], -1)
        expected, actual = run(link, x.contiguous(), shaped), run(link, x, shaped)
        assert torch.equal(actual.y, expected.y), layout
        for name, grad in expected.grads.items():
            assert torch.equal(actual.grads[name], grad), f"{layout}: {name}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=name_of)
def test_autocast_computes_in_half_with_float32_masters(use, variant, x_dtype):
    """y in x's dtype, weight gradients in the master's and not rounded to the compute dtype on the way."""
    use(variant)
    config = CONFIGS["inner-equation-3"]
    link, half = make_link(config), make_link(config, torch.float16)
    x, dy = make_rows(37, 40).to(x_dtype), make_rows(37, 40, seed=2)
    with torch.autocast("cpu", dtype=torch.float16):
        y = link(x.requires_grad_())
    y.backward(dy.to(y.dtype))
    expected = run(half, x.detach().half(), dy.half())
    assert (y.dtype, x.grad.dtype) == (x_dtype, x_dtype)
    assert torch.equal(y.detach().half(), expected.y)
    assert torch.equal(x.grad.half(), expected.grads["x"])
    for name, parameter in link.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter.grad, parameter.grad.half().float())
        torch.testing.assert_close(parameter.grad.half(), expected.grads[name], rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(use, variant, value):
    use(variant)
    link = make_link(CONFIGS["inner"])
    x = make_rows(9, 40)
    clean = link(x).detach()
    x[4, 3] = value
    spoiled = link(x).detach()
    assert not torch.isfinite(spoiled[4]).any()
    keep = torch.arange(9) != 4
    assert torch.equal(spoiled[keep], clean[keep])


def test_rows_far_from_zero_keep_their_variance(use):
    """The small kernel sees a row in pieces; merging them must not cancel when the mean is large."""
    use(plan.SMALL)
    link = make_link(LinkConfig("inner", 123, 16, 123, "identity"))
    check_link(link, make_rows(7, 123) + 300, make_rows(7, 123, seed=2))


def test_whole_tiles_drop_their_masks(use):
    use(plan.SMALL)
    link = make_link(LinkConfig("inner", 32, 16, 32, "identity"))
    check_link(link, make_rows(37, 32), make_rows(37, 32, seed=2))


def test_a_weight_without_bias_in_the_norms(use):
    for variant in VARIANTS:
        use(variant)
        x, gain = make_rows(5, 24), make_rows(24, seed=4)
        w1, w2 = make_rows(8, 24, seed=5), make_rows(24, 8, seed=6)
        given = recursive_link(x, w1, w2, norm_in=(gain, None), norm_out=(gain, None))
        zero = torch.zeros(24)
        torch.testing.assert_close(given, recursive_link(x, w1, w2, norm_in=(gain, zero), norm_out=(gain, zero)))


@pytest.mark.parametrize("norms", ["in", "out"])
@pytest.mark.parametrize(
    ("variant", "residual"),
    [(v, r) for v in VARIANTS for r in ("identity", "linear", "none") if (v, r) != (plan.SMALL, "linear")],
)
def test_one_norm_without_the_other(use, variant, residual, norms):
    use(variant)
    shapes = {"x": (9, 24), "w1": (20, 24), "w2": (24, 20), "b1": (20,), "gain": (24,), "shift": (24,), "dy": (9, 24)}
    tensors = {name: make_rows(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors |= {"w3": make_rows(24, 24, seed=9)} if residual == "linear" else {}

    def outputs(dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        dy = leaves.pop("dy")
        gain, shift = leaves["gain"], leaves["shift"]
        norm = {f"norm_{norms}": (gain, shift)}
        w3 = leaves.get("w3")
        y = recursive_link(leaves["x"], leaves["w1"], leaves["w2"], leaves["b1"], w3=w3, residual=residual, **norm)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)], ["y", *leaves]

    actual, names = outputs(torch.float32)
    with use_backend("reference"):
        eager, exact = outputs(torch.float32)[0], outputs(torch.float64)[0]
    for name, a, e, t in zip(names, actual, eager, exact, strict=True):
        check_budget(name, a.detach(), e.detach(), t.detach(), torch.float32)
