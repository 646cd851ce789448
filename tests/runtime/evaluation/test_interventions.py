"""The arms of an audit: each changes what it says, and nothing else."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, Pattern, RecursiveMAS
from recmas.engine.messages import Latents
from recmas.evaluation.interventions import ARMS, arm, derangement, why_left_out
from recmas.evaluation.untrained_links import embedding_map, shared_tokens
from tests.runtime.tiny import tiny_agent

ROWS = ["fox", "the lazy dog", "0 + 1 =", "plan"]
STEPS, MOST = 3, 4


@pytest.fixture(scope="module")
def mas():
    widths = {"planner": 32, "critic": 40, "solver": 32}
    agents = {role: tiny_agent("llama", role, widths[role], seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    made = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=STEPS, seed=0)
    with torch.no_grad():  # so that "random" has biases and gains to leave alone
        for link in [*made.inner_links.values(), *made.outer_links.values()]:
            link.norm_out.bias.normal_(std=0.01)
    return made


def final_prompt(made, rows=ROWS):
    answers = made.system.answer(rows, max_new_tokens=MOST, on_message=made.on_message, **made.changes)
    return answers, made.system.final_prompt


def in_arm(name, mas, seed=0):
    return final_prompt(arm(name, mas, seed))


def test_the_trained_arm_is_the_system(mas):
    answers, prompt = in_arm("trained", mas)
    assert [answer.text for answer in answers] == [a.text for a in mas.answer(ROWS, max_new_tokens=MOST)]
    assert prompt.embeds.shape[0] == len(ROWS)


@pytest.mark.parametrize("name", ARMS)
def test_the_system_is_left_as_it_was(mas, name):
    before = {key: value.clone() for link in mas.outer_links.values() for key, value in link.state_dict().items()}
    texts = [answer.text for answer in mas.answer(ROWS, max_new_tokens=MOST)]
    in_arm(name, mas)
    assert not any(link._forward_hooks for link in mas.outer_links.values())
    assert texts == [answer.text for answer in mas.answer(ROWS, max_new_tokens=MOST)]
    after = {key: value for link in mas.outer_links.values() for key, value in link.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["noise", "zeros"])
def test_only_what_a_receiver_reads_is_replaced(mas, name):
    _, trained = in_arm("trained", mas)
    _, changed = in_arm(name, mas)
    moved = (trained.embeds != changed.embeds).any(dim=-1) & trained.mask.bool()
    assert moved.sum(dim=1).tolist() == [STEPS] * len(ROWS)
    if name == "zeros":
        assert not changed.embeds[moved].any()
    else:
        assert changed.embeds[moved].norm(dim=-1) == pytest.approx(trained.embeds[moved].norm(dim=-1), rel=0.05)
        cosine = torch.cosine_similarity(trained.embeds[moved], changed.embeds[moved], dim=-1)
        assert cosine.abs().mean() < 0.4  # of random directions in 32 dimensions: about 0.14
        assert torch.equal(in_arm(name, mas)[1].embeds, changed.embeds)
        assert not torch.equal(in_arm(name, mas, seed=1)[1].embeds, changed.embeds)


@pytest.mark.parametrize("combine", ["slots", "mean", "weighted"])
def test_noise_has_the_norm_of_what_fills_the_slot(mas, combine):
    """Senders that share a slot are replaced together: the mean of two noises would be too short."""
    pattern = Pattern((("planner", "critic"), ("solver",)), combine=combine)
    joint = RecursiveMAS.create(mas.agents, pattern, rounds=1, latent_steps=STEPS, seed=0)
    (visit,) = [visit for visit in pattern.visits(1) if visit.role == "solver"]
    drawn = torch.randn(1, STEPS, 40, generator=torch.Generator().manual_seed(2))  # alike, so that links agree
    messages = {"planner": Latents(drawn[..., :32]), "critic": Latents(drawn)}
    prompts = []
    for system in (joint, arm("noise", joint, 0).system):
        with torch.no_grad():
            prompts.append(system.prompt(visit, [{"question": "fox"}], messages).embeds[0])
    trained, noise = prompts
    moved = (trained != noise).any(dim=-1)
    assert moved.sum() == STEPS * (2 if combine == "slots" else 1)
    assert torch.allclose(noise[moved].norm(dim=-1), trained[moved].norm(dim=-1), rtol=1e-5)


def test_no_latents_and_texts(mas):
    _, trained = in_arm("trained", mas)
    answers, empty = in_arm("no latents", mas)
    assert empty.mask.sum(dim=1).tolist() == (trained.mask.sum(dim=1) - STEPS).tolist()
    assert set(answers[0].latent_steps.values()) == {0}
    answers, _ = in_arm("text", mas)
    assert set(answers[0].text_tokens) == set(SEQUENTIAL.roles)


def test_shuffled_messages_are_those_of_another_row(mas):
    made = arm("shuffled", mas, 3)
    states = torch.arange(5.0).reshape(5, 1, 1)
    others = made.on_message(None, Latents(states)).states.flatten().tolist()
    assert others == derangement(5, 3)
    assert made.on_message(None, Latents(states)).states.flatten().tolist() == others  # at every visit the same


@pytest.mark.parametrize("count", [2, 3, 8, 33])
def test_a_derangement_is_one_circle(count):
    for seed in range(20):
        others, place, seen = derangement(count, seed), 0, set()
        while place not in seen:
            seen.add(place)
            place = others[place]
        assert seen == set(range(count))


def test_messages_of_round_1(mas):
    sent = []
    made = arm("round 1", mas, 0)

    def listen(visit, message):
        heard = made.on_message(visit, message)
        sent.append((visit.role, visit.round, heard.states))
        return heard

    made.system.answer(ROWS, max_new_tokens=1, on_message=listen)
    first = {role: states for role, round, states in sent if round == 1}
    assert [(role, round) for role, round, _ in sent if round == 2] == [("planner", 2), ("critic", 2)]
    assert all(torch.equal(states, first[role]) for role, _, states in sent)
    assert why_left_out("round 1", mas, 1) == "there is one round only"
    assert not why_left_out("round 1", mas, 2)


def test_random_links_keep_singular_values_alone(mas):
    made = arm("random", mas, 0)
    found = {**made.system.inner_links, **made.system.outer_links}
    for name, link in {**mas.inner_links, **mas.outer_links}.items():
        for key, weight in link.state_dict().items():
            other = found[name].state_dict()[key]
            if weight.dim() < 2:
                assert torch.equal(weight, other), key
                continue
            assert torch.allclose(torch.linalg.svdvals(weight), torch.linalg.svdvals(other), atol=1e-5)
            cosine = torch.cosine_similarity(weight.flatten(), other.flatten(), dim=0)
            assert cosine.abs() < 0.15, key  # 1024 entries or more


def test_identity_links_pass_on_what_they_read(mas):
    made = arm("identity", mas, 0)
    with torch.no_grad():
        inner, same = made.system.inner_links["planner"], made.system.outer_links["solver", "planner"]
        x = torch.randn(6, 32)
        for link in (inner, same):
            y = link(x)
            standard = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
            assert torch.allclose(y, standard * mas.agents["planner"].embedding_rms(), atol=1e-5)
        mapped = made.system.outer_links["planner", "critic"](x)
        assert mapped.shape == (6, 40)
        assert mapped.square().mean().sqrt() == pytest.approx(mas.agents["critic"].embedding_rms(), rel=1e-3)


def test_the_least_squares_map_finds_a_map_that_is_there(mas):
    sender, receiver = mas.agents["planner"], tiny_agent("llama", "r", 40)
    wanted = torch.randn(32, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        receiver.model.get_input_embeddings().weight.copy_(sender.model.get_input_embeddings().weight @ wanted)
    assert torch.allclose(embedding_map(sender, receiver), wanted, atol=1e-4)


def test_without_shared_tokens_there_is_no_identity(mas, monkeypatch):
    own, others = shared_tokens(mas.agents["planner"], mas.agents["critic"])
    assert own == others
    assert len(own) > 200
    assert not set(own) & set(mas.agents["planner"].tokenizer.all_special_ids)
    assert not why_left_out("identity", mas, 1)
    strange = {f"~{token}": number for token, number in mas.agents["critic"].tokenizer.get_vocab().items()}
    monkeypatch.setattr(mas.agents["critic"].tokenizer, "get_vocab", lambda: strange)
    reason = "critic->solver: the widths differ, and the vocabularies share no token"
    assert why_left_out("identity", mas, 1) == reason
