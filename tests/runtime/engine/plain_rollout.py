"""The rollout of one row, written plainly, and how far another way to compute it may be from that."""

from __future__ import annotations

import torch

from recmas.agents.agent import Agent


def uncached(agent: Agent, embeds: torch.Tensor, steps: int, link: torch.nn.Module) -> torch.Tensor:
    """Rollouts of ``embeds [n, T, d]`` as ``[n * steps, d]``: the whole sequence for every step, no cache, no mask."""
    states = []
    for _ in range(steps):
        hidden = agent.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
        states.append(link(hidden))
        embeds = torch.cat([embeds, states[-1][:, None]], dim=1)
    return torch.stack(states, dim=1).flatten(0, 1)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_rollout(found: torch.Tensor, agent: Agent, embeds: torch.Tensor, steps: int, link: torch.nn.Module) -> None:
    """AssertionError unless ``found`` is the uncached rollout of ``embeds [1, T, d]`` but for rounding.

    What rounding does to this model, these steps and this processor is measured: rollouts of embeddings one eps away
    differ by it, since every later operation rounds anew. A wrong mask or position is off by thousands of times that.
    """
    signs = torch.randint(0, 2, (3, *embeds.shape[1:]), generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = embeds * (1 + torch.finfo(embeds.dtype).eps * signs)
    plain, *others = uncached(agent, torch.cat([embeds, moved]), steps, link).split(steps)
    rounding = max(relative_error(states, plain) for states in others)
    error = relative_error(found, plain)
    assert error <= 4 * rounding, f"error {error:.3e}, rounding {rounding:.3e}"
    assert rounding < 1e-4, f"rounding alone moves this rollout by {rounding:.3e}: it can show nothing"
