"""The single agent and the looped model, made of a system's agents and prompts."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.config.system_json import PromptSpec
from recmas.engine.messages import Prompt
from recmas.evaluation.baselines import looped_model, single_agent, variant
from tests.runtime.tiny import tiny_agent


@pytest.fixture(scope="module")
def mas():
    agents = {role: tiny_agent("llama", role, seed=index) for index, role in enumerate(SEQUENTIAL.roles)}
    prompts = {"solver": PromptSpec("{{question}} Notes: {{from:critic}}. Answer, {{question}}:")}
    return RecursiveMAS.create(agents, SEQUENTIAL, prompts=prompts, latent_steps=2)


def test_it_hears_nobody(mas):
    alone = single_agent(mas)
    answer = alone.answer(["fox"], max_new_tokens=4)[0]
    agent = mas.agents["solver"]
    messages = [{"role": "user", "content": "fox Notes: . Answer, fox:"}]
    ids = agent.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert answer.tokens == agent.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer.latent_steps == {}


def test_another_agent_and_prompt(mas):
    answers = single_agent(mas, "planner", "{{question}}, {{hint}}").answer([{"question": "fox", "hint": "dog"}])
    assert list(answers[0].text_tokens) == ["planner"]


def test_refused(mas):
    with pytest.raises(ValueError, match="unknown role 'poet'; the pattern has planner, critic, solver"):
        single_agent(mas, "poet")
    with pytest.raises(ValueError, match="has a slot for 'critic', but reads from nobody"):
        single_agent(mas, "solver", "{{from:critic}}")
    with pytest.raises(ValueError, match="unknown role 'poet'"):
        looped_model(mas, "poet")
    one_round = RecursiveMAS.create(mas.agents, SEQUENTIAL, rounds=1, latent_steps=2)
    with pytest.raises(ValueError, match="agent 'solver' has no inner link to loop through"):
        looped_model(one_round)


def embedded(agent, text, latents=None):
    """A prompt embedded by hand: `text`, latents ``[1, m, d]`` at its "@", inside the chat template."""
    chat = agent.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    pieces = [agent.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in chat.split("@")]
    embeds = [agent.embed(torch.tensor([piece])) for piece in pieces]
    if latents is not None:
        embeds.insert(1, latents)
    joined = torch.cat(embeds, dim=1)
    return Prompt(joined, torch.ones(joined.shape[:2], dtype=torch.int64))


def test_each_loop_reads_the_latents_of_the_one_before(mas):
    agent, link = mas.agents["solver"], mas.inner_links["solver"]
    with torch.no_grad():
        first = agent.think(embedded(agent, "fox Notes: . Answer, fox:"), 3, link).states
        second = agent.think(embedded(agent, "fox Notes: @. Answer, fox:", first), 3, link).states
        last = embedded(agent, "fox Notes: @. Answer, fox:", second)
        tokens = agent.decode(last, 6)[0]
    options = {"rounds": 3, "latent_steps": 3, "max_new_tokens": 6, "trace": True}
    answers = looped_model(mas).answer(["fox"], **options, prefix_reuse=False)  # else other bits
    handoffs = answers[0].handoffs
    assert [(handoff.round, handoff.source, handoff.target) for handoff in handoffs] == [
        (2, "solver", "solver"),
        (3, "solver", "solver"),
    ]
    assert torch.equal(handoffs[0].latents, first[0])
    assert torch.equal(handoffs[1].latents, second[0])
    assert not torch.equal(first, second)
    assert answers[0].tokens == tokens
    assert answers[0].latent_steps == {"solver": 6}


def test_a_loop_of_one_pass_is_the_single_agent(mas):
    alone = single_agent(mas).answer(["fox", "the dog"], max_new_tokens=4)
    once = looped_model(mas).answer(["fox", "the dog"], rounds=1, max_new_tokens=4)
    assert [answer.tokens for answer in once] == [answer.tokens for answer in alone]


def test_an_agent_without_a_slot_gets_one_at_the_end(mas):
    prompts = {"planner": PromptSpec("Plan {{question}}", "Plan {{question}} again, {{from:solver}}, better")}
    agents = {role: mas.agents[role] for role in SEQUENTIAL.roles}
    with_slot = RecursiveMAS.create(agents, SEQUENTIAL, prompts=prompts, rounds=2)
    assert looped_model(with_slot, "planner").settings["planner"].prompt == PromptSpec(
        "Plan {{question}}", "Plan {{question}} again, {{from:planner}}, better"
    )
    looped = looped_model(single := single_agent_that_can_think(mas))
    assert looped.settings["solver"].prompt.later == single.template("solver", 2).text + "{{from:solver}}"


def single_agent_that_can_think(mas):
    alone = single_agent(mas)
    alone.inner_links["solver"] = mas.inner_links["solver"]
    return alone


def test_variants(mas):
    assert variant(mas, "latent") == (mas, "latent")
    assert variant(mas, "text") == (mas, "text")
    single, mode = variant(mas, "single")
    assert (single.outer_links, mode) == ({}, "latent")
    loop, mode = variant(mas, "loop")
    assert (set(loop.outer_links), mode) == ({("solver", "solver")}, "latent")
