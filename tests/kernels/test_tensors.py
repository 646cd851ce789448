"""How compiled modules read tensors: by either way the same, and what does not fit is refused or looked at closely."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, alignment_loss, packed, recursive_link
from recmas_kernels.backends import cpu, tensors
from recmas_kernels.backends.cpu.module import kernels
from recmas_kernels.reference import LinkArguments
from recmas_kernels.testing import configs, make_link, make_rows

compiled = pytest.mark.skipif(
    cpu.unavailable() is not None or tensors._native() is None, reason="needs recmas_kernels._cpu and _tensors"
)


@pytest.fixture
def attribute_reading():
    """A torch without DLPack's table of C functions."""
    modules = (kernels, tensors._native)
    for module in modules:
        module().connect(torch, None)
    yield
    for module in modules:
        module.cache_clear()
        module()


def everything(link: FusedRecursiveLink) -> list[torch.Tensor]:
    x = make_rows(3, link.config.in_features).requires_grad_()
    y = link(x)
    y.backward(make_rows(3, link.config.out_features, seed=2))
    loss = alignment_loss(y.detach().requires_grad_(), make_rows(9, y.shape[1]), token_ids=torch.tensor([0, 8, 8]))
    results = [y.detach(), x.grad, loss.detach()]
    for parameter in link.parameters():
        results.append(parameter.grad)
        parameter.grad = None
    with torch.no_grad():
        with packed(link):
            results += [link(x) for _ in range(2)]  # packed where large enough
        results.append(link(x.unsqueeze(1)[:, :, ::1].expand(-1, 2, -1)))
    return results


@compiled
@pytest.mark.parametrize("kind", configs())
def test_both_ways_of_reading_tensors_agree(kind, request):
    link = make_link(configs()[kind])
    expected = everything(link)
    request.getfixturevalue("attribute_reading")
    for found, wanted in zip(everything(link), expected, strict=True):
        assert torch.equal(found, wanted)


@compiled
def test_the_native_calls_refuse_what_does_not_fit():
    x, w = make_rows(3, 8), make_rows(8, 8)

    def forward(x: object, w1: object, y: object, **settings: object) -> bool:
        arguments = LinkArguments(x, w1, None, w, *[None] * 7, "identity", "none", 1e-5, torch.float32)
        arguments = arguments._replace(**settings)
        return kernels().link_forward(0, 1, arguments, False, False, False, y, None, None, None)

    y = torch.empty(3, 8)
    assert forward(x, w, y)
    with pytest.raises(ValueError, match="w1 has another shape than the call"):
        forward(x, make_rows(8, 7), y)
    with pytest.raises(ValueError, match="y has another shape than the call"):
        forward(x, w, torch.empty(2, 8))
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        forward([1.0], w, y)
    with pytest.raises(ValueError, match="residual is 'gated', expected 'identity', 'linear' or 'none'"):
        forward(x, w, y, residual="gated")
    with pytest.raises(ValueError, match="gelu is 'erf', expected 'none' or 'tanh'"):
        forward(x, w, y, gelu="erf")
    with pytest.raises(ValueError, match="dtype is torch.float64, expected torch.float32, torch.bfloat16 or"):
        forward(x, w, y, dtype=torch.float64)
    with pytest.raises(TypeError, match="must be real number, not str"):
        forward(x, w, y, eps="small")
    with pytest.raises(TypeError, match="expected 10 arguments, got 1"):
        kernels().link_forward(0)
    with pytest.raises(TypeError, match="expected LinkArguments, got tuple"):
        kernels().link_forward(0, 1, (x, w), False, False, False, y, None, None, None)
    assert not forward(x, w.double(), y), "another dtype is for the caller to convert"
    assert not forward(x, w.t(), y), "and so are other strides"


def plain_arguments(**changes: object) -> LinkArguments:
    """A link of every tensor that has nothing to convert, but for ``changes``."""
    inputs, hidden, outputs = 8, 6, 5
    arguments = LinkArguments(
        make_rows(3, inputs),
        make_rows(hidden, inputs),
        make_rows(1, hidden)[0],
        make_rows(outputs, hidden),
        make_rows(1, outputs)[0],
        make_rows(outputs, inputs),
        make_rows(1, outputs)[0],
        make_rows(1, inputs)[0],
        make_rows(1, inputs)[0],
        make_rows(1, outputs)[0],
        make_rows(1, outputs)[0],
        "linear",
        "none",
        1e-5,
        torch.float32,
    )
    return arguments._replace(**changes)


@compiled
def test_plain_links_are_recognised():
    absent = dict.fromkeys(("b1", "b2", "b3", "norm_in_bias", "norm_out_weight", "norm_out_bias"))
    assert tensors.is_plain_link(plain_arguments(), False)
    assert tensors.is_plain_link(plain_arguments(**absent), False)
    assert tensors.is_plain_link(plain_arguments(w2=make_rows(5, 6).bfloat16()), True), "as under autocast"


@compiled
@pytest.mark.parametrize(
    "changes",
    [
        {"x": make_rows(3, 7)},
        {"x": make_rows(2, 3, 8)},
        {"x": make_rows(8, 3).t()},
        {"x": make_rows(3, 8).double()},
        {"x": make_rows(3, 8).to_sparse()},
        {"x": make_rows(3, 8).to("meta")},
        {"w1": None},
        {"w1": make_rows(6, 7)},
        {"w1": make_rows(8, 6).t()},
        {"w2": make_rows(5, 6).bfloat16()},
        {"w3": None},
        {"residual": "none"},
        {"residual": "identity", "w3": None, "b3": None},
        {"residual": "gated"},
        {"residual": None},
        {"b1": make_rows(1, 5)[0]},
        {"norm_in_weight": None},
        {"norm_out_bias": make_rows(1, 8)[0]},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_needs_a_closer_look_is_not_plain(changes):
    assert not tensors.is_plain_link(plain_arguments(**changes), False)


def test_without_the_module_the_same_kernels_give_the_same_bits(monkeypatch):
    link, x = make_link(configs()["outer"]), make_rows(3, 40)
    expected = link(x)
    monkeypatch.setattr(tensors, "_native", lambda: None)
    assert torch.equal(link(x), expected)
    with pytest.raises(ValueError, match="w2 has shape"):
        recursive_link(make_rows(3, 8), make_rows(6, 8), make_rows(8, 5))
