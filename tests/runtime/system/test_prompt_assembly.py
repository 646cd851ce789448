"""The splice: embeddings of ids, link outputs in the slots, padding on the left, gradients to links and latents."""

from __future__ import annotations

import pytest
import torch

from recmas.engine.messages import Latents, run_link
from recmas.prompts.template import Slot
from recmas.system.joint_link import JointLink, join
from recmas.system.prompt_assembly import assemble
from tests.runtime.tiny import tiny_agent, tiny_link

A, B = ("a",), ("b",)


@pytest.fixture(scope="module")
def family():
    """A receiver and two senders of other widths with their outer links."""
    receiver, a, b = tiny_agent("llama", "c", 32), tiny_agent("llama", "a", 24), tiny_agent("llama", "b", 40)
    return receiver, {A: tiny_link(a, receiver, 1), B: tiny_link(b, receiver, 2)}


SEGMENTS = [
    [[10, 11], Slot(A), [12], Slot(B)],
    [Slot(B), [13, 14, 15, 16], Slot(A), [17]],
    [[18], Slot(A), Slot(B)],
]


def by_hand(receiver, links, states, lengths, segments):
    """Each row concatenated piece by piece; each link sees all the latents of its sender at once, as in the splice."""
    mapped = {}
    for key, link in links.items():
        said = torch.cat([state[:count] for state, count in zip(states[key], lengths[key], strict=True)])
        mapped[key] = link(said).split(lengths[key])
    rows = []
    for index, row in enumerate(segments):
        pieces = [
            mapped[piece.senders][index] if isinstance(piece, Slot) else receiver.embed(torch.tensor(piece))
            for piece in row
        ]
        rows.append(torch.cat(pieces))
    return rows


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_splice_equals_concatenation(family, grad, ragged):
    receiver, links = family
    generator = torch.Generator().manual_seed(0)
    states = {A: torch.randn(3, 4, 24, generator=generator), B: torch.randn(3, 2, 40, generator=generator)}
    lengths = {A: [4, 4, 4], B: [2, 2, 2]}
    if ragged:
        lengths = {A: [4, 1, 2], B: [0, 2, 1]}
    latents = {
        key: Latents(states[key].requires_grad_(grad), torch.tensor(lengths[key]) if ragged else None) for key in links
    }
    with torch.set_grad_enabled(grad):
        by_row = {key: [link] * 3 for key, link in links.items()}
        prompt = assemble(receiver.embed, SEGMENTS, latents, by_row, pad_id=0, device="cpu")
        rows = by_hand(receiver, links, states, lengths, SEGMENTS)
    width = max(len(row) for row in rows)
    assert prompt.embeds.shape == (3, width, 32)
    for index, row in enumerate(rows):
        assert prompt.mask[index].tolist() == [0] * (width - len(row)) + [1] * len(row)
        assert torch.equal(prompt.embeds[index, width - len(row) :], row)
    if grad:
        wanted = [*states.values(), *(weight for link in links.values() for weight in link.parameters())]
        weights = torch.randn(prompt.embeds.shape, generator=generator)
        found = torch.autograd.grad((prompt.embeds * weights * prompt.mask[..., None]).sum(), wanted)
        plain = sum((row * weights[index, width - len(row) :]).sum() for index, row in enumerate(rows))
        for ours, theirs in zip(found, torch.autograd.grad(plain, wanted), strict=True):
            assert torch.equal(ours, theirs)


def test_one_sender_in_two_slots(family):
    receiver, links = family
    latents = {A: Latents(torch.randn(1, 2, 24))}
    with torch.no_grad():
        by_row = {A: [links[A]]}
        prompt = assemble(receiver.embed, [[Slot(A), [5], Slot(A)]], latents, by_row, pad_id=0, device="cpu")
    assert torch.equal(prompt.embeds[0, :2], prompt.embeds[0, 3:])


def test_joint_slot_adds_weighted_link_outputs(family):
    receiver, links = family
    states = {A: torch.randn(2, 3, 24), B: torch.randn(2, 3, 40)}
    scores = torch.tensor([0.3, -0.4], requires_grad=True)
    joint = JointLink([links[A], links[B]], [24, 40], scores.softmax(0))
    both = ("a", "b")
    message = join([Latents(states[A]), Latents(states[B])])
    prompt = assemble(
        receiver.embed, [[Slot(both)], [[9], Slot(both)]], {both: message}, {both: [joint] * 2}, pad_id=0, device="cpu"
    )
    share = scores.softmax(0)
    terms = torch.stack([share[0] * links[A](states[A]), share[1] * links[B](states[B])])
    # Two products and a sum, each rounded by at most eps / 2 of the terms' magnitude, here and there.
    bound = 2 * torch.finfo(torch.float32).eps * terms.abs().sum(0)
    assert ((prompt.embeds[:, 1:] - terms.sum(0)).abs() <= bound).all()
    prompt.embeds[:, 1:].sum().backward()
    assert scores.grad is not None
    assert links[A].proj1.weight.grad is not None


def test_joint_slot_needs_equally_many_latents():
    with pytest.raises(ValueError, match="equally many latent steps"):
        join([Latents(torch.zeros(2, 3, 4)), Latents(torch.zeros(2, 2, 4))])


def test_rows_may_go_through_other_links(family):
    receiver, links = family
    other = tiny_link(tiny_agent("llama", "a", 24), receiver, 3)
    latents = {A: Latents(torch.randn(3, 2, 24), torch.tensor([2, 0, 1]))}
    segments = [[Slot(A)], [[5], Slot(A)], [Slot(A), [6]]]
    with torch.no_grad():
        prompt = assemble(receiver.embed, segments, latents, {A: [links[A], None, other]}, pad_id=0, device="cpu")
        alone = [
            assemble(
                receiver.embed,
                [segments[row]],
                {A: Latents(latents[A].states[row : row + 1], latents[A].lengths[row : row + 1])},
                {A: [link]},
                pad_id=0,
                device="cpu",
            ).embeds[0]
            for row, link in ((0, links[A]), (1, None), (2, other))
        ]
    for row, expected in enumerate(alone):
        assert torch.equal(prompt.embeds[row, 2 - len(expected) :], expected)


def test_wrong_inputs_are_told(family):
    receiver, links = family
    latents = {A: Latents(torch.zeros(2, 1, 24))}
    with pytest.raises(ValueError, match="latents of 2 rows for 1 prompts"):
        assemble(receiver.embed, [[[1]]], latents, {A: [links[A]]}, pad_id=0, device="cpu")
    with pytest.raises(ValueError, match=r"slot {{from:b}} has no latents"):
        assemble(receiver.embed, [[Slot(B)], [[1]]], latents, {A: [links[A]] * 2}, pad_id=0, device="cpu")
    with pytest.raises(ValueError, match="prompt 1 of the batch is empty"):
        assemble(receiver.embed, [[[1]], []], {}, {}, pad_id=0, device="cpu")


def test_run_link_casts_to_the_links_dtype():
    link = torch.nn.Linear(4, 3, dtype=torch.float64)
    assert run_link(link, torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.float64
    assert run_link(torch.neg, torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
