"""SharedPrefixes read once and activations computed again change neither states nor gradients, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recmas.system.prompt_assembly import assemble
from recmas.training.unroll import SharedPrefixes, recomputing
from tests.runtime.tiny import FAMILIES, prompts, tiny_agent

EQUAL = 1e-5  # of the largest entry, float32
LENGTHS = (11, 8, 13)
RECURRENT = "qwen3_5_text"


def states_and_gradient(agent, prompt, beginnings=None, recompute=False, known=None):
    """Hidden states of five forced tokens, and the gradient of the prompt's embeddings."""
    embeds = prompt.embeds.detach().requires_grad_()
    prompt = replace(prompt, embeds=embeds, prefix=known)
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(10, 300, (len(LENGTHS), 5), generator=generator)
    mask = torch.ones_like(targets)
    mask[1, 3:] = 0
    begun = None if beginnings is None else beginnings.of("agent", agent, prompt)
    with recomputing(agent.decoder, enabled=recompute):
        hidden = agent.hidden(prompt, targets, mask, begun)
    weight = torch.randn(hidden.shape, generator=generator) * mask[..., None]
    (gradient,) = torch.autograd.grad((hidden * weight).sum(), embeds)
    return hidden.detach() * mask[..., None], gradient


def close(actual, expected):
    return (actual - expected).abs().max() <= EQUAL * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_visits_go_on_from_what_was_read_without_gradients(family):
    agent = tiny_agent(family)
    prompt, _ = prompts(agent, LENGTHS)
    width = prompt.mask.shape[1]
    known = [ids[:-4] for ids in prompt.prefix]  # as if a slot began four columns before the end
    expected, gradient = states_and_gradient(agent, prompt)
    beginnings = SharedPrefixes()
    for _ in range(2):  # the second goes on from the very same keys and values
        hidden, found = states_and_gradient(agent, prompt, beginnings, known=known)
        assert close(hidden, expected)
        assert close(found[:, width - 4 :], gradient[:, width - 4 :])
        if family != RECURRENT:
            assert not found[:, : width - 4].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_gives_the_same_bits(family):
    agent = tiny_agent(family)
    prompt, _ = prompts(agent, LENGTHS)
    known = [ids[:-4] for ids in prompt.prefix]
    forwards = [layer.forward for layer in agent.decoder.layers]
    expected = states_and_gradient(agent, prompt, SharedPrefixes(), known=known)
    found = states_and_gradient(agent, prompt, SharedPrefixes(), recompute=True, known=known)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert [layer.forward for layer in agent.decoder.layers] == forwards


def test_other_prompts_are_read_anew():
    agent, beginnings = tiny_agent("llama"), SharedPrefixes()
    for seed in (1, 2):
        prompt, _ = prompts(agent, LENGTHS, seed)
        known = [ids[:-4] for ids in prompt.prefix]
        assert close(
            states_and_gradient(agent, prompt, beginnings, known=known)[0], states_and_gradient(agent, prompt)[0]
        )


def test_a_prompt_that_goes_on_otherwise_shares_what_it_begins_with():
    agent, beginnings = tiny_agent("llama"), SharedPrefixes()
    prompt, _ = prompts(agent, LENGTHS)
    width = prompt.mask.shape[1]
    assert beginnings.of("agent", agent, prompt).get_seq_length() == width - 1  # without a slot: all but the last
    known = [ids[:-4] for ids in prompt.prefix]
    known = [[*ids[:-1], ids[-1] + 1] for ids in known]
    ids = [[*first, *ids[-4:]] for first, ids in zip(known, prompt.prefix, strict=True)]
    other = assemble(agent.embed, [[row] for row in ids], {}, {}, pad_id=agent.pad_id, device="cpu")
    reads = count_reads(agent)
    found = states_and_gradient(agent, other, beginnings, known=known)
    assert reads == [4 + 1 + 4]  # from the token that differs on, and the forced ones
    expected = states_and_gradient(agent, other)
    assert close(found[0], expected[0])
    assert close(found[1][:, width - 5 :], expected[1][:, width - 5 :])


def count_reads(agent) -> list[int]:
    """Positions of each forward of the decoder from now on."""
    reads: list[int] = []
    agent.decoder.register_forward_pre_hook(
        lambda module, args, options: reads.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return reads


def test_a_sliding_window_that_lost_its_beginning_is_read_anew():
    agent, beginnings = tiny_agent("mistral"), SharedPrefixes()
    prompt, _ = prompts(agent, LENGTHS)
    first = beginnings.of("agent", agent, prompt)
    shorter = replace(prompt, prefix=[ids[:-3] for ids in prompt.prefix])
    reads = count_reads(agent)
    second = beginnings.of("agent", agent, shorter)
    assert reads == [first.get_seq_length() + 1 - 3]
    assert second.get_seq_length() == reads[0]


def test_nothing_is_begun_where_nothing_can_be_spared():
    agent, beginnings = tiny_agent("llama"), SharedPrefixes()
    prompt, _ = prompts(agent, LENGTHS)
    assert beginnings.of("agent", agent, replace(prompt, prefix=None)) is None
    assert beginnings.of("agent", agent, replace(prompt, prefix=[ids[:3] for ids in prompt.prefix])) is None
    assert beginnings.of("agent", agent, prompt) is not None
    with torch.no_grad():
        assert beginnings.of("agent", agent, prompt) is None
    agent.decoder.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 8}
    assert SharedPrefixes().of("agent", agent, prompt) is None
