"""Back through a rollout step by step: the gradients of the graph that keeps everything, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recmas.training.rollout import can_repeat, think
from recmas.training.unroll import SharedPrefixes
from tests.runtime.tiny import FAMILIES, prompts, tiny_agent, tiny_link

EQUAL = 1e-4  # of the largest entry, float32, through a chain of steps
LENGTHS = (11, 8, 13)
RECURRENT = "qwen3_5_text"


def rolled_out(agent, link, prompt, steps, run):
    """Latents, and the gradient of the prompt's embeddings."""
    embeds = prompt.embeds.detach().requires_grad_()
    latents = run(replace(prompt, embeds=embeds), steps, link).states
    weight = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((latents * weight).sum(), embeds)
    return latents.detach(), gradient


def close(actual, expected):
    return (actual - expected).abs().max() <= EQUAL * expected.abs().max()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9])  # 9: windows of 5 and 6 have moved past the prompt's end
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != RECURRENT])
def test_latents_and_gradients_are_those_of_the_whole_graph(family, steps, begun):
    agent = tiny_agent(family)
    link = tiny_link(agent).requires_grad_(False)
    prompt, _ = prompts(agent, LENGTHS)
    assert can_repeat(agent, link)
    first = 0
    if begun:  # as if a slot began four columns before the end
        prompt = replace(prompt, prefix=[ids[:-4] for ids in prompt.prefix])
        first = prompt.mask.shape[1] - 4
    expected = rolled_out(agent, link, prompt, steps, agent.think)

    def run(prompt, steps, link):
        return think(agent, prompt, steps, link, SharedPrefixes().of("agent", agent, prompt) if begun else None)

    found = rolled_out(agent, link, prompt, steps, run)
    assert close(found[0], expected[0])
    assert close(found[1][:, first:], expected[1][:, first:])
    if begun:
        assert not found[1][:, :first].any()
    again = rolled_out(agent, link, prompt, steps, run)
    assert torch.equal(again[1], found[1])


def test_what_cannot_be_run_again_step_by_step_is_kept():
    agent = tiny_agent(RECURRENT)
    link = tiny_link(agent).requires_grad_(False)
    assert not can_repeat(agent, link)  # more than keys and values
    agent = tiny_agent("llama")
    assert not can_repeat(agent, tiny_link(agent))  # the link's own gradients are wanted


def test_a_rollout_holds_the_activations_of_one_step():
    """Of a graph that keeps all, every step more holds a copy of all keys and values more."""
    agent = tiny_agent("llama")
    link = tiny_link(agent).requires_grad_(False)
    prompt, _ = prompts(agent, (60, 60))

    def held(run, steps):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            run(replace(prompt, embeds=prompt.embeds.detach().requires_grad_()), steps, link)
        return sum(sizes)

    def repeated(prompt, steps, link):
        return think(agent, prompt, steps, link)

    assert held(repeated, 12) < held(repeated, 2) + 12 * prompt.embeds[:, 0].nbytes
    assert held(agent.think, 12) > held(agent.think, 2) + 10 * prompt.embeds.nbytes


def test_a_rollout_that_does_not_fit_is_refused():
    agent = tiny_agent("llama")
    prompt, _ = prompts(agent, LENGTHS)
    with pytest.raises(ValueError, match="a prompt of 13 positions and 299 latent steps exceeds its context of 256"):
        think(agent, prompt, 300, tiny_link(agent).requires_grad_(False))
