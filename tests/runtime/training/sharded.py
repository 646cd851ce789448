"""What each process of a sharded run checks: `test_sharding` starts it in two processes of one thread."""

from __future__ import annotations

import torch

from recmas.training import outer_loss, shard_agents
from tests.runtime.training.by_hand import ROWS, STEPS, build


def gradients(system, row, latents, recompute):
    for link in system.outer_links.values():
        link.zero_grad()
    loss = outer_loss(system, [row], 3, latent_steps=STEPS, latents=latents, recompute=recompute)
    loss.backward()
    parameters = [p for link in system.outer_links.values() for p in link.parameters()]
    return loss.item(), torch.cat([p.grad.flatten() for p in parameters])


def held(system) -> tuple[int, int]:
    """Entries of layers' parameters that this process holds, and all of them."""
    parameters = [p for agent in system.agents.values() for p in agent.decoder.layers.parameters()]
    return sum(getattr(p, "_local_tensor", p).numel() for p in parameters), sum(p.numel() for p in parameters)


def main() -> None:
    whole, system = build(), build()
    for one in (whole, system):
        for link in one.inner_links.values():
            link.requires_grad_(False)
    shard_agents(system)
    index = torch.distributed.get_rank()
    for latents in ("forced", "rollout"):
        for recompute in (True, False):
            expected = gradients(whole, ROWS[index], latents, recompute)
            loss, found = gradients(system, ROWS[index], latents, recompute)
            assert abs(loss - expected[0]) <= 1e-5 * expected[0], (latents, recompute)
            assert (found - expected[1]).abs().max() <= 1e-4 * expected[1].abs().max(), (latents, recompute)
            mine, total = held(system)
            assert mine <= 0.6 * total, (mine, total)
    # One process prints: lines of two processes in one pipe may run into each other.
    held_by = [0, 0]
    torch.distributed.all_gather_object(held_by, mine)
    if index == 0:
        print(f"of {total} entries the processes held", *held_by)
