"""Batches that do not grow on one cache: read again at every step, apart by length, or past a switch of LongRoPE."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from recmas.agents.agent import Agent
from recmas.engine.continuation import SingleSteps, frequency_switch
from recmas.engine.messages import Prompt
from recmas.engine.prefill import begin, forward_groups
from recmas.engine.rereading import Apart, Rereading, Switching
from tests.runtime.engine.test_latent_rollout import relative_error, uncached
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_tokenizer

STEPS = 8
SWITCH = 12


@pytest.fixture(scope="module")
def longrope() -> Agent:
    """A model whose frequencies change by a factor of up to eight where a row passes 12 positions."""
    config = Phi3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=SWITCH,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": SWITCH,
        },
    )
    torch.manual_seed(0)
    return Agent(AutoModelForCausalLM.from_config(config).float(), tiny_tokenizer(), name="phi")


def grown(agent: Agent, past, prompt: Prompt, link) -> torch.Tensor:
    """The rollout ``[B, m, d]`` on any past."""
    states = [link(past.feed(prompt.embeds))]
    for _ in range(STEPS - 1):
        states.append(link(past.feed(states[-1][:, None])))
    return torch.stack(states, dim=1)


def check(agent: Agent, found: torch.Tensor, rows: list[torch.Tensor], link) -> None:
    for index, embeds in enumerate(rows):
        assert relative_error(found[index], uncached(agent, embeds, STEPS, link)) < 1e-5


@pytest.mark.parametrize("lengths", [(9, 3, 7, 3), (5, 5), (1,)], ids=["ragged", "even", "one"])
@torch.no_grad()
def test_every_past_gives_the_uncached_rollout(agent, lengths):
    link = tiny_link(agent)
    batch, rows = prompts(agent, lengths)
    for past in (
        Rereading(agent.decoder, batch.mask),
        SingleSteps(agent.decoder, batch.mask, STEPS),
        Apart(agent.decoder, batch.mask, lambda mask: Rereading(agent.decoder, mask)),
        Apart(agent.decoder, batch.mask, lambda mask: SingleSteps(agent.decoder, mask, STEPS)),
    ):
        check(agent, grown(agent, past, batch, link), rows, link)
        assert past.mask.shape == (len(lengths), max(lengths) + STEPS - 1)


@torch.no_grad()
def test_single_steps_take_several_positions_one_by_one(agent):
    batch, _ = prompts(agent, (9, 4))
    more = agent.embed(torch.tensor([[20, 21, 22], [23, 24, 25]]))
    past = SingleSteps(agent.decoder, batch.mask, 3)
    past.feed(batch.embeds)
    again = Rereading(agent.decoder, batch.mask)
    again.feed(batch.embeds)
    assert relative_error(past.feed(more), again.feed(more)) < 1e-5


def test_where_frequencies_switch(longrope):
    assert frequency_switch(longrope.decoder.config) == SWITCH
    assert frequency_switch(tiny_agent("llama").decoder.config) is None
    assert isinstance(begin(longrope.decoder, torch.ones(1, 3, dtype=torch.int64), 0, None), Switching)


@pytest.mark.parametrize(
    "lengths",
    [(3, 2), (20, 17), (20, 3), (10, 10), (10, 4, 14, 8), (12, 5), (1,)],
    ids=["before", "past", "on both sides", "cross at once", "cross apart", "cross at the end of a prompt", "one"],
)
@torch.no_grad()
def test_a_row_has_the_frequencies_of_its_own_length(longrope, lengths):
    link = tiny_link(longrope)
    batch, rows = prompts(longrope, lengths)
    found = longrope.think(batch, STEPS, link).states
    check(longrope, found, rows, link)


@torch.no_grad()
def test_a_neighbour_past_the_switch_would_change_a_row(longrope):
    """What `Switching` is for: in one forward, a short row gets the frequencies of the long one."""
    batch, rows = prompts(longrope, (20, 8))
    together = longrope.decoder(inputs_embeds=batch.embeds, attention_mask=batch.mask).last_hidden_state[1, -1]
    assert relative_error(together, longrope.decoder(inputs_embeds=rows[1]).last_hidden_state[0, -1]) > 1e-2


def test_teacher_forcing_across_the_switch(longrope):
    batch, rows = prompts(longrope, (10, 4, 14))
    targets = torch.tensor([[20, 30, 40, 50]] * 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    groups = forward_groups(longrope.decoder, batch.mask, mask)
    assert [rows.tolist() for rows in groups] == [[1], [0, 2]]
    found = longrope.hidden(batch, targets, mask)
    for index, embeds in enumerate(rows):
        count = int(mask[index].sum())
        whole = torch.cat([embeds, longrope.embed(targets[index : index + 1, : count - 1])], dim=1)
        expected = longrope.decoder(inputs_embeds=whole, use_cache=False).last_hidden_state[0, -count:]
        assert relative_error(found[index, :count], expected) < 1e-5


def test_decoding_across_the_switch(longrope):
    batch, rows = prompts(longrope, (10, 4))
    written = longrope.decode(batch, 6)
    for tokens, embeds in zip(written, rows, strict=True):
        whole = torch.cat([embeds, longrope.embed(torch.tensor([tokens[:-1]]))], dim=1)
        for count, token in enumerate(tokens):
            states = longrope.decoder(inputs_embeds=whole[:, : embeds.shape[1] + count]).last_hidden_state[:, -1]
            assert longrope.logits(states).argmax() == token
