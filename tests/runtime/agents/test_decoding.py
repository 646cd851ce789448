"""Decoding: greedy equals transformers' generate, sampling its distribution, and rows do not see their neighbours."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from recmas.agents.agent import Agent
from recmas.agents.sampling import Sampler, choose
from recmas.engine.messages import Prompt
from tests.runtime.tiny import prompts, tiny_agent, tiny_model, tiny_tokenizer


def one(embeds: torch.Tensor) -> Prompt:
    return Prompt(embeds, torch.ones(1, embeds.shape[1], dtype=torch.int64))


def test_greedy_equals_generate(agent):
    batch, _ = prompts(agent, (7, 2, 5))
    arguments = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
    expected = agent.model.generate(**arguments, max_new_tokens=12, do_sample=False)
    found = agent.decode(batch, 12)
    for row, ids in zip(found, expected.tolist(), strict=True):
        assert row == ids[: len(row)]
        assert len(row) == 12 or row[-1] in agent.eos_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 128, 384, 1000])
def test_the_most_likely_token_is_the_first_of_the_highest_logits(dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (64, vocabulary), generator=generator).to(dtype)  # most rows have ties
    logits[1] = -torch.inf
    logits[2, -1] = torch.nan
    logits[3, 1:] = -torch.inf
    logits[4, vocabulary // 2] = torch.inf
    expected = [row.index(max(row)) if max(row) < torch.inf else -1 for row in logits.tolist()]
    expected[1] = expected[2] = -1
    assert choose(logits).tolist() == expected


def test_rows_end_at_any_end_of_text_token_and_leave_the_others_alone():
    agent = tiny_agent("llama")
    batch, rows = prompts(agent, (7, 2, 5))
    free = agent.decode(batch, 10)
    stop = free[1][3]
    agent.model.generation_config.eos_token_id = [2, stop]
    assert agent.eos_ids == {2, stop}
    ended = agent.decode(batch, 10)
    for row, whole in zip(ended, free, strict=True):
        assert row == whole[: whole.index(stop) + 1 if stop in whole else 10]
    assert [agent.decode(one(embeds), 10)[0] for embeds in rows] == ended


def test_no_new_tokens():
    agent = tiny_agent("llama")
    assert agent.decode(prompts(agent, (3, 4))[0], 0) == [[], []]


def test_each_row_stops_at_the_end_of_the_context():
    agent = Agent(tiny_model("llama"), tiny_tokenizer(), name="x")
    agent.model.config.max_position_embeddings = 10
    agent.model.generation_config.eos_token_id = None
    agent.tokenizer.eos_token = None
    assert [len(row) for row in agent.decode(prompts(agent, (10, 4))[0], 20)] == [1, 7]


def test_ended_rows_need_no_positions_that_the_model_lacks():
    """GPT-2 has a table of positions; a row at its end stays in the batch while the others go on."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=20, bos_token_id=1, eos_token_id=2)
    agent = Agent(AutoModelForCausalLM.from_config(config).float(), tiny_tokenizer(), name="x")
    agent.model.generation_config.eos_token_id = None
    agent.tokenizer.eos_token = None
    batch, rows = prompts(agent, (18, 4))
    together = agent.decode(batch, 50)
    assert [len(row) for row in together] == [3, 17]
    assert [agent.decode(one(embeds), 50)[0] for embeds in rows] == together


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_sampled_rows_do_not_depend_on_their_neighbours(family):
    agent = tiny_agent(family)
    batch, rows = prompts(agent, (7, 2, 5))
    together = agent.decode(batch, 12, temperature=0.9, top_p=0.95, seed=3)
    for number, embeds in enumerate(rows):
        assert agent.decode(one(embeds), 12, 0.9, 0.95, 3, rows=[number]) == [together[number]]
    assert agent.decode(batch, 12, 0.9, 0.95, seed=4) != together


def test_equal_prompts_draw_differently_in_different_rows():
    agent = tiny_agent("llama")
    embeds = prompts(agent, (5,))[1][0]
    twice = Prompt(embeds.expand(2, -1, -1), torch.ones(2, 5, dtype=torch.int64))
    first, second = agent.decode(twice, 12, temperature=1.0)
    assert first != second


def test_sampler_draws_the_nucleus_by_its_probabilities():
    """20000 draws: each frequency within five standard deviations of the nucleus's own distribution."""
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = 2.0 * probabilities.log()  # a temperature of 2 undoes the factor
    kept = torch.tensor([0.0, 0.4, 0.25, 0.2, 0.0]) / 0.85  # 0.4 + 0.25 < 0.7 <= 0.4 + 0.25 + 0.2
    count = 20000
    sampler = Sampler(2.0, 0.7, [1], range(count))
    drawn = torch.bincount(sampler.choose(logits.expand(count, -1), sampler.draw(range(count))[0]), minlength=5) / count
    deviation = (kept * (1 - kept) / count).sqrt()
    assert ((drawn - kept).abs() <= 5 * deviation).all()
