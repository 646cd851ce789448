"""The cached rollout against full uncached re-forwards, for every family, padded and not."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.config.system_json import PromptSpec
from recmas.engine.messages import Prompt
from tests.runtime.engine.plain_rollout import check_rollout, relative_error, uncached
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_tokenizer

STEPS = 8
LENGTHS = {"even": (9, 9, 9), "padded": (9, 3, 7)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@torch.no_grad()
def test_cached_rollout_equals_the_uncached_one_row_by_row(agent, lengths):
    link = tiny_link(agent)
    batch, rows = prompts(agent, lengths)
    states = agent.think(batch, STEPS, link).states
    assert states.shape == (len(rows), STEPS, agent.hidden_size)
    for index, embeds in enumerate(rows):
        check_rollout(states[index], agent, embeds, STEPS, link)


@torch.no_grad()
def test_ragged_batch_equals_each_row_alone(agent):
    link = tiny_link(agent)
    batch, rows = prompts(agent, (4, 11, 1, 6))
    together = agent.think(batch, STEPS, link).states
    for index, embeds in enumerate(rows):
        alone = agent.think(Prompt(embeds, torch.ones(1, embeds.shape[1], dtype=torch.int64)), STEPS, link).states
        check_rollout(together[index], agent, embeds, STEPS, link)
        check_rollout(alone[0], agent, embeds, STEPS, link)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(agent):
    link = torch.nn.Linear(agent.hidden_size, agent.hidden_size)  # no packed weights: the same bits in every call
    batch, _ = prompts(agent, (9, 3))
    changed = Prompt(torch.where(batch.mask[..., None] == 1, batch.embeds, 7.0), batch.mask)
    assert torch.equal(agent.think(batch, 4, link).states, agent.think(changed, 4, link).states)


@torch.no_grad()
def test_rollout_passes_the_sliding_window():
    agent = tiny_agent("gemma3_text")
    assert agent.decoder.config.sliding_window == 5
    link = tiny_link(agent)
    batch, rows = prompts(agent, (13, 3))
    states = agent.think(batch, 12, link).states
    for index, embeds in enumerate(rows):
        check_rollout(states[index], agent, embeds, 12, link)


def test_rollout_runs_neither_head_nor_hidden_state_lists(agent):
    batch, _ = prompts(agent, (3, 5))
    link = tiny_link(agent)
    head = agent.model.get_output_embeddings()
    ran = head.register_forward_hook(lambda *_: pytest.fail("the LM head ran"))
    seen = []
    decoder = agent.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("output_hidden_states", False)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            agent.think(batch, 3, link)
    finally:
        decoder.remove()
        ran.remove()
    assert seen == [False] * 3


@torch.no_grad()
def test_hidden_predicts_each_target(agent):
    """hidden() row by row: the state before each target token, from a plain unpadded forward."""
    batch, rows = prompts(agent, (6, 2))
    targets = torch.tensor([[20, 30, 40], [50, 60, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = agent.hidden(batch, targets, mask)
    assert found.shape == (2, 3, agent.hidden_size)
    for index, embeds in enumerate(rows):
        count = int(mask[index].sum())
        whole = torch.cat([embeds, agent.embed(targets[index : index + 1, : count - 1])], dim=1)
        expected = agent.decoder(inputs_embeds=whole, use_cache=False).last_hidden_state[0, -count:]
        assert relative_error(found[index, :count], expected) < 1e-5


@torch.no_grad()
def test_logits_are_the_models_own(agent):
    batch, _ = prompts(agent, (5, 3))
    arguments = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
    expected = agent.model(**arguments).logits
    found = agent.logits(agent.decoder(**arguments).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_embedding_scale_is_the_modules(agent):
    ids = torch.arange(10, 20)[None]
    table = agent.model.get_input_embeddings().weight
    torch.testing.assert_close(agent.embed(ids), table[ids] * agent.embed_scale)
    assert agent.embedding_rms() == pytest.approx(agent.embed(torch.arange(320)[None]).square().mean().sqrt().item())


def test_gradients_reach_the_prompt_through_a_rollout():
    """Under grad the rollout is one graph: the gradient equals that of full re-forwards."""
    agent = tiny_agent("llama")
    link = tiny_link(agent)
    batch, rows = prompts(agent, (7, 7))
    weights = torch.randn(2, 3, agent.hidden_size, generator=torch.Generator().manual_seed(0))
    embeds = batch.embeds.clone().requires_grad_()
    (agent.think(Prompt(embeds, batch.mask), 3, link).states * weights).sum().backward()
    for index, row in enumerate(rows):
        row = row.clone().requires_grad_()
        (uncached(agent, row, 3, link) * weights[index]).sum().backward()
        assert relative_error(embeds.grad[index], row.grad[0]) < 1e-5


def test_no_steps_give_empty_latents(agent):
    batch, _ = prompts(agent, (3, 5))
    assert agent.think(batch, 0, tiny_link(agent)).states.shape == (2, 0, agent.hidden_size)


def test_a_link_of_another_dtype_keeps_its_own(agent):
    """float32 masters beside a model of lower precision, and the other way round."""
    batch, _ = prompts(agent, (3, 5))
    with torch.no_grad():
        states = agent.think(batch, 2, tiny_link(agent).double()).states
    assert states.dtype == torch.float64


def test_context_overflow_is_told_before_the_model_runs():
    agent = tiny_agent("llama", "planner")
    batch, _ = prompts(agent, (250,))
    with pytest.raises(ValueError, match="agent 'planner'.*250 positions and 9 latent steps.*context of 256"):
        agent.think(batch, 10, tiny_link(agent))


@torch.no_grad()
def test_logits_of_an_unknown_kind_of_model_are_its_own():
    model = tiny_agent("granite").model
    model.config.model_type = "martian"
    agent, ids = Agent(model, tiny_tokenizer(), name="x"), torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    assert relative_error(agent.logits(agent.decoder(ids).last_hidden_state), expected) < 1e-6
    assert relative_error(model.lm_head(agent.decoder(ids).last_hidden_state), expected) > 0.1  # it scales them


def test_a_prompt_that_a_later_agent_cannot_read_is_told_before_any_model_runs(monkeypatch):
    agents = {role: tiny_agent("llama", role) for role in SEQUENTIAL.roles}
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=4, seed=0)
    mas.settings["solver"].prompt = PromptSpec(None, "{{note}}{{from:critic}}")
    mas = RecursiveMAS(agents, mas.inner_links, mas.outer_links, SEQUENTIAL, settings=mas.settings)
    monkeypatch.setattr(Agent, "think", lambda *_, **__: pytest.fail("a model ran"))
    monkeypatch.setattr(Agent, "write", lambda *_, **__: pytest.fail("a model ran"))
    short, long = ({"question": "fox", "note": "fox " * count} for count in (1, 100))
    told = "agent 'solver': a prompt of [0-9]+ positions( and 3 latent steps)? exceeds its context of 256$"
    for options in ({"rounds": 2}, {"rounds": 1}, {"rounds": 1, "mode": "text"}):
        with pytest.raises(ValueError, match=f"^row 1: {told}"):
            mas.answer([short, long], latent_steps=4, **options)
        with pytest.raises(ValueError, match=f"^row 0: {told}"):
            mas.stream(long, latent_steps=4, **options)
        with pytest.raises(pytest.fail.Exception, match="a model ran"):
            mas.answer([short], latent_steps=4, **options)
