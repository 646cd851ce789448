"""Links are packed for the time of an answer and of a rollout, where their weights stay; the bits are the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.system.system import System
from recmas.training.teacher import named_parameters, only_trainable
from recmas_kernels.backends import cpu, packing
from tests.runtime.tiny import prompts, tiny_agent

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
# Three, since some processors read one or two rows from unpacked weights.
QUESTIONS = ["what is the answer?", "0 + 1 =", "and then?"]


@pytest.fixture(autouse=True)
def small_weights_are_packed_too(monkeypatch):
    monkeypatch.setattr(cpu.link, "_LEAST_PACKED", 1)
    yield
    assert not packing._entries


def agents():
    return {role: tiny_agent("qwen2", role, 32, seed) for seed, role in enumerate(("planner", "critic", "solver"))}


@pytest.fixture(scope="module")
def mas():
    return RecursiveMAS.create(agents(), SEQUENTIAL, rounds=2, latent_steps=3, seed=0)


def answered(mas):
    """Texts, the latents that were sent, and the bytes that were packed at each message."""
    sent, held = [], []

    def note(visit, message):
        sent.append(message.states.clone())
        held.append(packing.packed_bytes())
        return message

    texts = [answer.text for answer in mas.answer(QUESTIONS, max_new_tokens=6, on_message=note)]
    return texts, sent, held


def test_an_answer(mas, monkeypatch):
    texts, sent, held = answered(mas)
    assert all(held)
    monkeypatch.setattr(System, "packed_links", lambda self: nullcontext())
    plain_texts, plain_sent, plain_held = answered(mas)
    assert not any(plain_held)
    assert texts == plain_texts
    assert len(sent) == len(plain_sent) > 0
    assert all(torch.equal(one, other) for one, other in zip(sent, plain_sent, strict=True))


def test_a_stream(mas):
    held = []
    handle = mas.outer_links["planner", "critic"].register_forward_hook(lambda *_: held.append(len(packing._entries)))
    for _ in mas.stream(QUESTIONS[0], max_new_tokens=6):
        pass
    handle.remove()
    assert held
    assert all(held)


def test_a_rollout(mas):
    agent, link = mas.agents["planner"], mas.inner_links["planner"]
    prompt, _ = prompts(agent, (4, 7, 5))
    held = []
    handle = link.register_forward_hook(lambda *_: held.append(packing.packed_bytes()))
    with torch.no_grad():
        agent.think(prompt, 3, link)
        agent.think(prompt, 3, link, weights_stay=False)
    handle.remove()
    assert all(held[:3])
    assert not any(held[3:])
    assert len(held) == 6


def test_nothing_is_packed_under_offload(mas):
    offloaded = RecursiveMAS(
        mas.agents, mas.inner_links, mas.outer_links, mas.pattern, settings=mas.settings, defaults=mas.defaults,
        edge_scores=mas.edge_scores, offload="cpu",
    )  # fmt: skip
    with offloaded.packed_links():
        assert not packing._entries


def test_training_packs_no_link(mas):
    parameters = named_parameters({"link": mas.outer_links["planner", "critic"]})
    with only_trainable(mas, parameters):
        assert not packing._entries
