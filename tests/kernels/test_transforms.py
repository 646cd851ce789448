"""torch.func transforms and forward-mode AD: plain torch serves them, so that nothing is dropped on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from recmas_kernels import (
    BackendUnavailableError,
    FusedRecursiveLink,
    alignment_loss,
    latent_handoff,
    use_backend,
)
from recmas_kernels.testing import configs, eager_twin, make_link, make_rows

KINDS = ("inner", "outer")


def jvp(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(link, (x,), (v,))[1]


def dual(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(link(forward_ad.make_dual(x, v))).tangent


def grad(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda rows: link(rows).square().sum())(x)


def grad_of_parameters(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(link, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(dict(link.named_parameters()))
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def vmap(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(link)(torch.stack((x, v)))


def hessian(link: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.hessian(lambda rows: link(rows).square().sum())(x[:1, :4].repeat(1, x.shape[1] // 4))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("transform", [jvp, dual, grad, grad_of_parameters, vmap, hessian])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str, transform: Callable[[nn.Module, Tensor, Tensor], Tensor], learns: bool) -> None:
    link = make_link(configs()[kind], torch.float64).requires_grad_(learns)
    eager = eager_twin(link, torch.float64).requires_grad_(learns)
    x, v = (make_rows(3, link.config.in_features, dtype=torch.float64, seed=seed) for seed in (1, 2))
    expected = transform(eager, x, v)
    assert expected.abs().max() > 0
    torch.testing.assert_close(transform(link, x, v), expected)


def test_float32_and_autocast() -> None:
    link = make_link(configs()["inner"]).requires_grad_(False)
    x, v = (make_rows(3, link.config.in_features, seed=seed) for seed in (1, 2))
    eager = eager_twin(link, torch.float32).requires_grad_(False)
    torch.testing.assert_close(jvp(link, x, v), jvp(eager, x, v))
    with torch.autocast("cpu", torch.bfloat16):
        tangent = jvp(link, x, v)
    assert tangent.dtype == torch.float32, "the output keeps x's dtype"
    assert not torch.equal(tangent, jvp(link, x, v)), "and was computed in autocast's"


def test_handoffs() -> None:
    link = make_link(configs()["outer"], torch.float64).requires_grad_(False)
    rows, tangents = (make_rows(2, link.config.in_features, dtype=torch.float64, seed=seed) for seed in (1, 2))
    embeds, slots = torch.zeros(5, link.config.out_features, dtype=torch.float64), torch.tensor([3, 0])

    def send(hidden: Tensor) -> Tensor:
        return latent_handoff(hidden, link, embeds, slot_rows=slots)

    values, tangent = torch.func.jvp(send, (rows,), (tangents,))[:2]
    assert torch.equal(tangent[slots], jvp(link, rows, tangents))
    assert tangent.count_nonzero(1).bool().tolist() == [True, False, False, True, False]
    torch.testing.assert_close(values, send(rows))
    with pytest.raises(ValueError, match="outside of transforms"):
        torch.func.jvp(
            lambda hidden: latent_handoff(hidden, link, embeds, slot_rows=slots, inplace=True), (rows,), (tangents,)
        )


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss(masked: bool) -> None:
    pred, table, v = (make_rows(5, 8, dtype=torch.float64, seed=seed) for seed in (1, 2, 3))
    ids, mask = torch.tensor([0, 4, 2, 2, 1]), torch.tensor([True, False, True, True, False]) if masked else None
    if masked:
        pred[1] = float("nan")

    def loss(rows: Tensor) -> Tensor:
        return alignment_loss(rows, table, token_ids=ids, mask=mask, mse_weight=0.3, embed_scale=1.5)

    learning = pred.clone().requires_grad_()
    value = loss(learning)
    (expected,) = torch.autograd.grad(value, learning)
    torch.testing.assert_close(torch.func.grad(loss)(pred), expected)
    found, slope = torch.func.jvp(loss, (pred,), (v,))[:2]
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(slope, (expected * v).sum())


def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    link = FusedRecursiveLink.inner(8)
    x = make_rows(3, 8)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="'cpu' cannot serve torch.func transforms"):
        jvp(link, x, x)
    with use_backend("reference"):
        assert jvp(link, x, x).shape == x.shape
