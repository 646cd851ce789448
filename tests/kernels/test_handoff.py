"""The latent handoff: rows through a link into slots, and back."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, latent_handoff, use_backend
from recmas_kernels.testing import LOW_PRECISION, make_rows, name_of, poisoned_allocations

SLOTS = torch.tensor([1, 2, 6, 9])


def by_hand(rows, embeds, slots):
    out = embeds.clone().view(-1, embeds.shape[-1])
    for row, slot in zip(rows, slots.tolist(), strict=True):
        out[slot] = row
    return out.view(embeds.shape)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=name_of)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_rows_land_in_their_slots_and_nothing_else_moves(backend, dtype, width):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the cpu backend serves float32, bfloat16 and float16")
    hidden, embeds = make_rows(2, 2, width, dtype=dtype), make_rows(2, 5, width, dtype=dtype, seed=2)
    expected = by_hand(hidden.view(-1, width), embeds, SLOTS)
    before = embeds.clone()
    with poisoned_allocations(), torch.no_grad():
        assert torch.equal(latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS), expected)
        assert torch.equal(embeds, before)
        assert latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS, inplace=True) is embeds
    assert torch.equal(embeds, expected)


def test_source_rows_choose_and_order_the_latents(backend):
    hidden, embeds = make_rows(6, 8), make_rows(10, 8, seed=2)
    source = torch.tensor([5, 0, 3, 3])
    out = latent_handoff(hidden, torch.nn.Identity(), embeds, slot_rows=SLOTS, source_rows=source)
    assert torch.equal(out, by_hand(hidden[source], embeds, SLOTS))


def test_gradients_through_link_and_embeddings(backend):
    link = FusedRecursiveLink.outer(8, 6)
    hidden = make_rows(2, 2, 8).requires_grad_()
    embeds = make_rows(2, 5, 6, seed=2).requires_grad_()
    dy = make_rows(2, 5, 6, seed=3)
    latent_handoff(hidden, link, embeds, slot_rows=SLOTS).backward(dy)
    slots = dy.view(-1, 6)[SLOTS]
    expected = torch.autograd.grad(link(hidden.view(-1, 8)), (hidden, *link.parameters()), slots)
    for actual, grad in zip((hidden, *link.parameters()), expected, strict=True):
        torch.testing.assert_close(actual.grad, grad)
    untouched = dy.view(-1, 6).clone()
    untouched[SLOTS] = 0
    assert torch.equal(embeds.grad.view(-1, 6), untouched)


def test_gradcheck_in_float64():
    link = FusedRecursiveLink.outer(5, 3, dtype=torch.float64)
    hidden = make_rows(4, 5, dtype=torch.float64).requires_grad_()
    embeds = make_rows(10, 3, dtype=torch.float64, seed=2).requires_grad_()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda h, e: latent_handoff(h, link, e, slot_rows=SLOTS), (hidden, embeds))


def test_no_latents_leave_the_embeddings_as_they_are(backend):
    embeds = make_rows(4, 8)
    out = latent_handoff(make_rows(0, 8), torch.nn.Identity(), embeds, slot_rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, embeds)


def test_expanded_gradients(backend):
    hidden = make_rows(4, 8).requires_grad_()
    latent_handoff(hidden, torch.nn.Identity(), make_rows(10, 8, seed=2), slot_rows=SLOTS).sum().backward()
    assert torch.equal(hidden.grad, torch.ones(4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_rows": SLOTS.int()}, "slot_rows is torch.int32"),
        ({"slot_rows": SLOTS[:3]}, "slot_rows names 3 rows for 4 latents"),
        ({"source_rows": SLOTS[:, None]}, "source_rows is torch.int64 of shape"),
        ({"slot_rows": SLOTS.to("meta")}, "embeds is on cpu and slot_rows is on meta"),
        ({"embeds": torch.zeros(10, 9)}, "the link returns 8 features, embeds has 9"),
        ({"hidden": torch.zeros(4, 8, requires_grad=True), "inplace": True}, "only for inference"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"hidden": make_rows(4, 8), "link": torch.nn.Identity(), "embeds": make_rows(10, 8), "slot_rows": SLOTS}
    with pytest.raises(ValueError, match=message):
        latent_handoff(**{**call, **change})


@pytest.mark.parametrize("slots", [[1, 2, 6, 10], [1, 2, 6, -1]])
def test_slots_out_of_range_never_write(backend, slots):
    memory = make_rows(30, 8)
    before, embeds = memory.clone(), memory[10:20]
    with torch.no_grad(), pytest.raises((ValueError, IndexError, RuntimeError)):
        latent_handoff(make_rows(4, 8), torch.nn.Identity(), embeds, slot_rows=torch.tensor(slots), inplace=True)
    assert torch.equal(memory[:10], before[:10])
    assert torch.equal(memory[20:], before[20:])


def test_latents_that_are_rows_of_the_embeddings(backend):
    embeds = make_rows(4, 8)
    expected = embeds[[1, 0, 3, 2]]
    with torch.no_grad():
        latent_handoff(embeds, torch.nn.Identity(), embeds, slot_rows=torch.tensor([1, 0, 3, 2]), inplace=True)
    assert torch.equal(embeds, expected)


def test_repeated_slots_are_caught_on_request(backend, monkeypatch):
    monkeypatch.setenv("RECMAS_CHECK", "1")
    with pytest.raises(ValueError, match="slot_rows"):
        latent_handoff(make_rows(4, 8), torch.nn.Identity(), make_rows(10, 8), slot_rows=torch.tensor([1, 2, 2, 3]))
