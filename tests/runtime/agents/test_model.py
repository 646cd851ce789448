"""What an agent takes from its model's and its tokenizer's settings."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.agents.targets import target_tokens
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("ids", [5, [5, 6], (5, 6), torch.tensor(5), torch.tensor([5, 6]), None])
def test_ends_of_text_in_any_form(ids):
    agent = tiny_agent("llama")
    agent.model.generation_config.eos_token_id = ids
    expected = set() if ids is None else set(torch.as_tensor(ids).reshape(-1).tolist())
    assert agent.eos_ids == expected | {2}
    assert all(type(token) is int for token in agent.eos_ids)


def test_one_of_several_ends_of_text_in_a_tensor_ends_the_text():
    agent = tiny_agent("llama")
    batch, _ = prompts(agent, (4, 6))
    (first, *_), _ = agent.decode(batch, 5)
    agent.model.generation_config.eos_token_id = torch.tensor([first, 2])
    assert agent.decode(batch, 5)[0] == [first]


def test_padding_is_a_token_that_the_model_knows():
    """The table ends where the tokenizer's added padding token begins; results are those of any other padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    agent = Agent(tiny_model("llama"), tokenizer, name="x")
    assert agent.tokenizer.pad_token_id == agent.vocabulary == 320
    assert agent.pad_id == 2
    same = tiny_agent("llama")
    lengths = (2, 7)
    assert agent.decode(prompts(agent, lengths)[0], 4) == same.decode(prompts(same, lengths)[0], 4)


def test_tokens_that_the_model_does_not_know_are_named():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    agent = Agent(tiny_model("llama"), tokenizer, name="x")
    told = r"agent 'x': token 320 \('<tool>'\) of its tokenizer is beyond its model's 320 embeddings"
    for read in (agent.literal, lambda text: target_tokens(agent, ["fox", text])):
        with pytest.raises(ValueError, match=told):
            read("the <tool>")
    assert agent.literal("the fox")


def test_float64_checkpoints_serve(tmp_path):
    agents = {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    for agent in agents.values():
        agent.to(dtype=torch.float64)
    system = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    system.save_pretrained(tmp_path / "s")
    again = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert again.agents["solver"].dtype == torch.float64
    questions = ["fox", "the lazy dog"]
    assert [answer.text for answer in again.answer(questions)] == [answer.text for answer in system.answer(questions)]
    agent = again.agents["planner"]
    assert agent.think(prompts(agent, (3, 5))[0], 2, tiny_link(agent)).states.isfinite().all()
