"""Level recompute: only x is kept for the backward pass, and the gradients are the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from recmas_kernels import FusedRecursiveLink, recursive_link
from recmas_kernels.testing import configs, make_link, make_rows

TOKENS = 7


def gradients(
    link: FusedRecursiveLink, x: torch.Tensor, recompute: bool, compute: torch.dtype | None = None
) -> tuple[list[torch.Tensor], int]:
    """``([y, dx, gradients of the parameters that learn], bytes kept beside x and the parameters)``."""
    link.recompute = recompute
    x = x.clone().requires_grad_()
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *link.parameters())}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", compute, enabled=compute is not None):
        y = link(x)
    parameters = [parameter for parameter in link.parameters() if parameter.requires_grad]
    dy = make_rows(*y.shape, seed=3, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)], sum(kept)


def check_equal(link: FusedRecursiveLink, x: torch.Tensor, compute: torch.dtype | None = None) -> tuple[int, int]:
    expected, kept = gradients(link, x, recompute=False, compute=compute)
    found, kept_recomputing = gradients(link, x, recompute=True, compute=compute)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return kept, kept_recomputing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", configs())
def test_the_gradients_are_the_same_bits_and_nothing_is_kept(backend, kind, dtype):
    link = make_link(configs()[kind], dtype)
    config = link.config
    kept, kept_recomputing = check_equal(link, make_rows(TOKENS, config.in_features, dtype=dtype))
    numbers = config.hidden_features + (config.out_features if config.norm else 0)
    assert kept == TOKENS * (numbers * dtype.itemsize + 4 * 4)
    assert kept_recomputing == 0


def test_frozen_subsets(backend):
    link = make_link(configs()["outer"])
    for frozen in ("proj1", "proj2", ""):
        link.requires_grad_(True)
        for name, parameter in link.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        check_equal(link, make_rows(TOKENS, link.config.in_features))


def test_autocast_of_the_forward_holds_in_the_backward_pass(backend):
    link = make_link(configs()["inner"])
    x = make_rows(TOKENS, link.config.in_features)
    _, kept_recomputing = check_equal(link, x, torch.bfloat16)
    assert kept_recomputing == 0
    assert not torch.equal(gradients(link, x, True)[0][0], gradients(link, x, True, torch.bfloat16)[0][0])


@pytest.mark.parametrize("changed", ["proj1.weight", "pre_ln.bias", "x"])
def test_what_changed_in_between_is_an_error_as_in_torch(backend, changed):
    link = make_link(configs()["inner"])
    link.recompute = True
    x = make_rows(TOKENS, link.config.in_features)
    y = link(x)
    with torch.no_grad():
        {"x": x, **dict(link.named_parameters())}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_pass(backend):
    link = make_link(configs()["inner"])
    link.recompute = True
    x = make_rows(TOKENS, link.config.in_features).requires_grad_()
    y = link(x).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=retain)[0] for retain in (True, False))
    assert torch.equal(first, second)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_links_keep_nothing_either(compiler):
    link = make_link(configs()["inner"])
    x = make_rows(TOKENS, link.config.in_features)
    expected, _ = gradients(link, x, recompute=False)
    link.recompute = True
    found, kept = gradients(torch.compile(link, fullgraph=True, backend=compiler), x, recompute=True)
    assert kept == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_a_choice_of_the_moment(tmp_path):
    link = make_link(configs()["inner"])
    assert not link.recompute
    state = link.state_dict()
    link.recompute = True
    assert link.state_dict().keys() == state.keys()
    assert copy.deepcopy(link).recompute
    link.save_pretrained(tmp_path)
    assert not FusedRecursiveLink.from_pretrained(tmp_path).recompute


def test_the_function_takes_it_as_well():
    x, w1, w2 = make_rows(3, 8).requires_grad_(), make_rows(6, 8), make_rows(8, 6, seed=2)
    expected = torch.autograd.grad(recursive_link(x, w1, w2).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(recursive_link(x, w1, w2, recompute=True).sum(), x)[0], expected)
