"""The alignment loss, and the handoff where Triton serves, in the interpreter."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from recmas_kernels import alignment_loss, latent_handoff
from recmas_kernels.backends.triton import alignment
from recmas_kernels.testing import check_budget, make_rows, name_of

SLOTS = torch.tensor([1, 2, 6, 9])


def plain(pred, target, mask, cosine_weight, mse_weight):
    rows = cosine_weight * (1 - F.cosine_similarity(pred, target, dim=-1))
    rows = rows + mse_weight * (pred - target).square().mean(-1)
    weight = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    return (rows * weight).sum() / weight.sum()


def loss_and_grad(function, pred):
    pred = pred.detach().requires_grad_()
    loss = function(pred)
    (grad,) = torch.autograd.grad(loss, pred)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1)], ids=str)
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "table"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (29, 123)])
def test_loss_and_gradient_stay_in_the_error_budget(tokens, width, gather, weights, dtype):
    pred, table = make_rows(tokens, width, dtype=dtype), make_rows(31, width, dtype=dtype, seed=2)
    ids = torch.randint(0, 31, (tokens,), generator=torch.Generator().manual_seed(3))
    mask, scale = torch.arange(tokens) % 3 != 1, 1.5 if gather else 1.0
    options = {"mask": mask, "cosine_weight": weights[0], "mse_weight": weights[1]}

    def fused(pred):
        if gather:
            return alignment_loss(pred, table, token_ids=ids, embed_scale=scale, **options)
        return alignment_loss(pred, table[ids], **options)

    loss, grad = loss_and_grad(fused, pred)
    wanted = table[ids].double() * scale
    exact = loss_and_grad(lambda p: plain(p, wanted, mask, *weights), pred.double())
    eager = loss_and_grad(lambda p: plain(p, wanted.to(dtype), mask, *weights), pred)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    check_budget("loss", loss, eager[0], exact[0], dtype)
    check_budget("gradient", grad, eager[1], exact[1], dtype)


def test_loss_of_strided_rows_without_a_mask():
    wide, target = make_rows(6, 16), make_rows(6, 8, seed=2)
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, target), wide[:, 8:])
    flat = loss_and_grad(lambda p: alignment_loss(p, target), wide[:, 8:].contiguous())
    assert torch.equal(loss, flat[0])
    assert torch.equal(grad, flat[1])


@pytest.mark.parametrize("tokens", [0, 4])
def test_an_empty_mask_gives_zero_with_zero_gradient(tokens):
    pred, mask = torch.full((tokens, 8), float("nan")), torch.zeros(tokens, dtype=torch.bool)
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, make_rows(tokens, 8), mask=mask), pred)
    assert loss == 0
    assert torch.equal(grad, torch.zeros(tokens, 8))


def test_masked_rows_may_hold_anything():
    pred, table, ids = make_rows(4, 8), make_rows(5, 8, seed=2), torch.tensor([0, 1, 4, 2])
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    clean = loss_and_grad(lambda p: alignment_loss(p, table, token_ids=ids, mask=mask, mse_weight=0.5), pred)
    pred[1], ids[1] = float("nan"), -100
    spoiled = loss_and_grad(lambda p: alignment_loss(p, table, token_ids=ids, mask=mask, mse_weight=0.5), pred)
    assert torch.equal(spoiled[0], clean[0])
    assert torch.equal(spoiled[1][1], torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_the_gradient_of_a_loss_that_something_follows(monkeypatch, factor, dtype):
    """Scaled where it lies, unless by 1; a graph that is retained gives the same again."""
    pred, target = make_rows(9, 1000, dtype=dtype), make_rows(9, 1000, dtype=dtype, seed=2)
    monkeypatch.setattr("recmas_kernels.backends.triton.alignment.SCALED", 1024)
    alone = loss_and_grad(lambda p: alignment_loss(p, target), pred)[1]
    learning = pred.detach().requires_grad_()
    loss = alignment_loss(learning, target)
    for by in (factor, 1.0, factor):
        (grad,) = torch.autograd.grad(loss, learning, torch.tensor(by), retain_graph=True)
        torch.testing.assert_close(grad, (alone.float() * by).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("factor", "stores"), [(1.0, 0), (2.0, 9)])
def test_a_gradient_that_stays_as_it_is_is_not_written(monkeypatch, factor, stores):
    """A program per 1024 elements; beside the factor, none reads anything where that is 1."""
    builder = interpreter.interpreter_builder
    stored = mock.Mock(wraps=builder.create_masked_store)
    monkeypatch.setattr(alignment, "SCALED", 1024)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    grad = make_rows(9, 1024)
    expected = grad * factor
    assert alignment.alignment_bwd(grad, torch.tensor(factor)) is grad
    assert torch.equal(grad, expected)
    assert stored.call_count == stores


@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_a_token_id_outside_the_table_is_not_read(wrong):
    ids = torch.tensor([0, wrong])
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, make_rows(5, 8), token_ids=ids), make_rows(2, 8))
    assert torch.isnan(loss)
    assert torch.isfinite(grad[0]).all()


def test_a_zero_row_is_finite_as_in_torch():
    pred, target = torch.zeros(2, 8), make_rows(2, 8)
    loss, grad = loss_and_grad(lambda p: alignment_loss(p, target), pred)
    expected = loss_and_grad(lambda p: plain(p, target.double(), None, 1.0, 0.0), pred.double())
    torch.testing.assert_close(loss.double(), expected[0])
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("width", [1, 7, 1040])
def test_rows_land_in_their_slots_and_nothing_else_moves(dtype, width):
    hidden, embeds = make_rows(4, width, dtype=dtype), make_rows(10, width, dtype=dtype, seed=2)
    expected = embeds.clone().index_copy_(0, SLOTS, hidden)
    before = embeds.clone()
    with torch.no_grad():
        assert torch.equal(latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS), expected)
        assert torch.equal(embeds, before)
        latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS, inplace=True)
    assert torch.equal(embeds, expected)


@pytest.mark.parametrize("slot", [10, -1, 2**40])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_slot_outside_of_the_embeddings_is_refused(slot, inplace):
    memory = make_rows(30, 8)
    before = memory.clone()
    slots = torch.tensor([1, 2, 6, slot])
    with torch.no_grad(), pytest.raises(ValueError, match="slot_rows"):
        latent_handoff(make_rows(4, 8), torch.nn.Identity(), memory[10:20], slot_rows=slots, inplace=inplace)
    assert torch.equal(memory[:10], before[:10])
    assert torch.equal(memory[20:], before[20:])


def test_handoff_gradients():
    hidden, embeds = make_rows(4, 8).requires_grad_(), make_rows(10, 8, seed=2).requires_grad_()
    dy = make_rows(10, 8, seed=3)
    latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS).backward(dy)
    assert torch.equal(hidden.grad, dy[SLOTS])
    assert torch.equal(embeds.grad, dy.index_fill(0, SLOTS, 0))


def test_no_latents_leave_the_embeddings_as_they_are():
    embeds = make_rows(4, 8)
    out = latent_handoff(make_rows(0, 8), torch.nn.Identity(), embeds, slot_rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, embeds)
