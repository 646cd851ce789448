"""The modules: parameters as the reference implementation names them, one state dict for eager and fused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, RecursiveLink
from recmas_kernels.testing import check_budget, configs, eager_twin, make_link, make_rows

INNER = {
    "proj1.weight": (8, 8),
    "proj1.bias": (8,),
    "proj2.weight": (8, 8),
    "proj2.bias": (8,),
    "pre_ln.weight": (8,),
    "pre_ln.bias": (8,),
    "post_ln.weight": (8,),
    "post_ln.bias": (8,),
}
OUTER = {
    "proj1.weight": (10, 8),
    "proj1.bias": (10,),
    "proj2.weight": (5, 10),
    "proj2.bias": (5,),
    "residual_proj.weight": (5, 8),
    "residual_proj.bias": (5,),
    "ln_source.weight": (8,),
    "ln_source.bias": (8,),
    "ln_target.weight": (5,),
    "ln_target.bias": (5,),
}


@pytest.mark.parametrize(
    ("link", "expected"), [(FusedRecursiveLink.inner(8), INNER), (FusedRecursiveLink.outer(8, 5), OUTER)]
)
def test_released_shapes_and_names(link, expected):
    assert {name: tuple(value.shape) for name, value in link.state_dict().items()} == expected
    assert all(parameter.dtype == torch.float32 for parameter in link.parameters())


@pytest.mark.parametrize("kind", configs())
def test_the_state_dict_round_trips_with_the_eager_module(backend, kind):
    fused = make_link(configs()[kind])
    eager = RecursiveLink(fused.config)
    eager.load_state_dict(fused.state_dict(), strict=True)
    again = FusedRecursiveLink(fused.config)
    again.load_state_dict(eager.state_dict(), strict=True)
    x = make_rows(64, fused.config.in_features)
    check_budget("y", again(x), eager(x), eager_twin(eager, torch.float64)(x.double()), torch.float32)
    assert torch.equal(again(x), fused(x))


@pytest.mark.parametrize("residual", ["identity", "none"])
def test_one_layer_links_run_as_plain_torch(residual):
    link = FusedRecursiveLink.inner(8, layers=1, norm=False, residual=residual)
    x = make_rows(3, 8)
    expected = link.proj1(x) + (x if residual == "identity" else 0)
    assert torch.equal(link(x), expected)
    assert set(link.state_dict()) == {"proj1.weight", "proj1.bias"}


def test_copies_and_pickles_are_independent(backend):
    link = make_link(configs()["inner"])
    x = make_rows(3, 40)
    expected = link(x).detach()
    for twin in (copy.deepcopy(link), pickle.loads(pickle.dumps(link))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.proj1.weight.zero_()
        assert torch.equal(link(x), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_copies_and_pickles_of_a_compiled_link_run_their_own_weights():
    link = make_link(configs()["inner"])
    link.compile(backend="eager")
    x = make_rows(3, 40)
    expected = link(x).detach()
    for twin in (copy.deepcopy(link), pickle.loads(pickle.dumps(link))):
        assert torch.equal(twin(x), expected)
        twin.proj2.weight.data.zero_()
        assert not torch.allclose(twin(x), expected)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
def test_outputs_are_nobodys_views(backend, shape):
    """Autograd lets nobody detach a view in place, as loops over time do with a state."""
    link = make_link(configs()["inner"])
    y = link(make_rows(*shape))
    y.detach_()
    assert not y.requires_grad
    with torch.no_grad():
        assert not link(make_rows(*shape))._is_view()


def test_conversions_take_effect(backend):
    link = make_link(configs()["inner"])
    x = make_rows(64, 40)
    with torch.no_grad():
        for _ in range(3):
            link(x)
        half = link.to(torch.bfloat16)(x.bfloat16())
        assert half.dtype == torch.bfloat16
        back = link.float()(x)
        truth = eager_twin(link, torch.float64)(x.double())
        check_budget("back in float32", back, eager_twin(link, torch.float32)(x), truth, torch.float32)
        exact = eager_twin(link, torch.float64)(x.bfloat16().double())
        check_budget("bfloat16", half, eager_twin(link, torch.bfloat16)(x.bfloat16()), exact, torch.bfloat16)


def test_the_norm_out_is_what_the_link_writes_with():
    link = FusedRecursiveLink.outer(8, 5)
    assert link.norm_out is link.ln_target
    assert FusedRecursiveLink.inner(8).norm_out is not None
    assert FusedRecursiveLink.inner(8, norm=False).norm_out is None
