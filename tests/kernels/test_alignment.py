"""The alignment loss and its gradient against float64 autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recmas_kernels import alignment_loss, use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.testing import LOW_PRECISION, check_budget, make_rows, name_of, poisoned_allocations


def plain(pred, target, mask, cosine_weight, mse_weight):
    """The formula in torch, in the dtype of its arguments."""
    rows = cosine_weight * (1 - F.cosine_similarity(pred, target, dim=-1))
    rows = rows + mse_weight * (pred - target).square().mean(-1)
    weight = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    return (rows * weight).sum() / weight.sum()


def loss_and_grad(function, pred):
    pred = pred.detach().requires_grad_()
    loss = function(pred)
    (grad,) = torch.autograd.grad(loss, pred)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1)], ids=str)
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "table"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (7, 123), (129, 40)])
def test_loss_and_gradient_stay_in_the_error_budget(backend, tokens, width, gather, weights, dtype):
    pred = make_rows(tokens, width, dtype=dtype)
    table = make_rows(31, width, dtype=dtype, seed=2)
    ids = torch.randint(0, 31, (tokens,), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(tokens) % 3 != 1
    scale = 1.5 if gather else 1.0
    target = table[ids]

    def fused(pred):
        options = {"mask": mask, "cosine_weight": weights[0], "mse_weight": weights[1]}
        if gather:
            return alignment_loss(pred, table, token_ids=ids, embed_scale=scale, **options)
        return alignment_loss(pred, target, **options)

    with cpu.fresh_scratch(), poisoned_allocations():
        loss, grad = loss_and_grad(fused, pred)
    wanted = target.double() * scale
    exact = loss_and_grad(lambda p: plain(p, wanted, mask, *weights), pred.double())
    eager = loss_and_grad(lambda p: plain(p, (target.double() * scale).to(dtype), mask, *weights), pred)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    check_budget("loss", loss, eager[0], exact[0], torch.float32 if dtype == torch.float32 else dtype)
    check_budget("gradient", grad, eager[1], exact[1], dtype)


def test_leading_dimensions_and_layouts(backend):
    wide = make_rows(2, 3, 16)
    pred, target = wide[..., ::2], make_rows(2, 3, 8, seed=2)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, target, mask=mask), pred)
    flat = loss_and_grad(
        lambda p: alignment_loss(p, target.view(-1, 8), mask=mask.view(-1)), pred.contiguous().view(-1, 8)
    )
    assert torch.equal(loss, flat[0])
    assert torch.equal(grad.view(-1, 8), flat[1])


@pytest.mark.parametrize("tokens", [0, 4])
def test_an_empty_mask_gives_zero_with_zero_gradient(backend, tokens):
    pred = torch.full((tokens, 8), float("nan"))
    mask = torch.zeros(tokens, dtype=torch.bool)
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, make_rows(tokens, 8), mask=mask), pred)
    assert loss == 0
    assert torch.equal(grad, torch.zeros(tokens, 8))


def test_masked_rows_may_hold_anything(backend):
    pred, target = make_rows(4, 8), make_rows(4, 8, seed=2)
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    clean = loss_and_grad(lambda p: alignment_loss(p, target, mask=mask, mse_weight=0.5), pred)
    pred[1] = float("nan")
    spoiled = loss_and_grad(lambda p: alignment_loss(p, target, mask=mask, mse_weight=0.5), pred)
    assert torch.equal(spoiled[0], clean[0])
    assert torch.equal(spoiled[1][1], torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=name_of)
def test_weights_may_be_unsigned(backend, dtype):
    pred, target, mask = make_rows(3, 8), make_rows(3, 8, seed=2), torch.tensor([1, 0, 2])
    assert torch.equal(alignment_loss(pred, target, mask=mask.to(dtype)), alignment_loss(pred, target, mask=mask))


def test_masked_token_ids_may_be_an_ignore_index(backend):
    pred, table = make_rows(3, 8), make_rows(5, 8, seed=2)
    mask = torch.tensor([True, False, True])
    ignored, valid = torch.tensor([1, -100, 2]), torch.tensor([1, 0, 2])
    for ids in (ignored, torch.tensor([1, 99, 2])):
        loss, grad = loss_and_grad(lambda p, ids=ids: alignment_loss(p, table, token_ids=ids, mask=mask), pred)
        expected = loss_and_grad(lambda p: alignment_loss(p, table, token_ids=valid, mask=mask), pred)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


def test_a_zero_row_is_finite_as_in_torch(backend):
    pred, target = torch.zeros(2, 8), make_rows(2, 8)
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, target), pred)
    expected = loss_and_grad(lambda p: plain(p, target.double(), None, 1.0, 0.0), pred.double())
    torch.testing.assert_close(loss.double(), expected[0])
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_the_incoming_gradient_scales(backend):
    pred, target = make_rows(3, 8), make_rows(3, 8, seed=2)
    _, grad = loss_and_grad(lambda p: alignment_loss(p, target), pred)
    _, scaled = loss_and_grad(lambda p: 3 * alignment_loss(p, target), pred)
    torch.testing.assert_close(scaled, 3 * grad)


def test_only_pred_gets_a_gradient(backend):
    pred = make_rows(3, 8).requires_grad_()
    table = make_rows(5, 8, seed=2).requires_grad_()
    alignment_loss(pred, table, token_ids=torch.tensor([0, 4, 4])).backward()
    assert pred.grad is not None
    assert table.grad is None


def test_gradcheck_in_float64():
    pred = make_rows(4, 5, dtype=torch.float64).requires_grad_()
    target = make_rows(4, 5, dtype=torch.float64, seed=2)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda p: alignment_loss(p, target, mse_weight=0.3), (pred,))


def test_token_ids_out_of_range_never_read(backend):
    for wrong in (5, -1):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            alignment_loss(make_rows(2, 8), make_rows(5, 8), token_ids=torch.tensor([0, wrong]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3, 8)}, ValueError, r"target has shape \(3, 8\), expected \(4, 8\)"),
        ({"token_ids": torch.zeros(4)}, TypeError, "token_ids has dtype torch.float32"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "token_ids has shape"),
        (
            {"target": torch.zeros(9, 7), "token_ids": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"expected an embedding table \[vocabulary, 8\]",
        ),
        ({"target": torch.zeros(4, 8, device="meta")}, ValueError, "pred is on cpu and target is on meta"),
        ({"mask": torch.ones(4, 1)}, ValueError, "mask has shape"),
        ({"mask": torch.tensor([1, 0, -2, -1])}, ValueError, r"mask\[2\] is -2, expected a weight >= 0"),
        ({"pred": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "pred has dtype torch.int64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        alignment_loss(**{"pred": make_rows(4, 8), "target": make_rows(4, 8), **change})
