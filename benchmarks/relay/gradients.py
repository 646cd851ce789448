"""Theorem 4.1 through real frozen agents: how much of a gradient comes back through a round.

A round leads from what an agent sends in one round, ``z [m, d]``, to what it sends in the next: through outer links,
the other agents' prompts, their latent rollouts and inner links, and its own. For a random direction v the gain of that
round's Jacobian J is ``|J^T v| / |v|``, which has no unit, since both ends are the same agent's latents. The theorem
says 1 of links alone, and a small number of text that is sure of its words. Gains of successive rounds multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.relay.asked import WORLDS, relay
from recmas import Agent, RecursiveMAS
from recmas.engine.messages import Latents
from recmas.evaluation.untrained_links import passing
from recmas.lab.agents import relay_system
from recmas.lab.tasks import RELAY as TASK
from recmas.lab.world import questions
from recmas.training import InnerConfig, WarmupConfig, train_inner, train_warmup

KINDS = ("text", "default", "identity", "ridge", "trained")
ROUNDS = HOPS = 4
SEEDS = (1, 2, 3, 4, 5)
"""Of the links that are drawn."""
DIRECTIONS = 4


class Worded(nn.Module):
    """The text channel of one agent: ``W_in^T softmax(W_out h)``, the mean embedding of what it may say.

    ``entropy`` is the mean one of the last call, in nats.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self._agent, self.entropy = agent, 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        p = self._agent.logits(hidden).softmax(-1)
        self.entropy = float(torch.special.entr(p.detach()).sum(-1).mean())
        return p @ self._agent.embed(torch.arange(p.shape[-1])[None])[0]


def measure(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell per kind and seed of links: gains by round, a number per question and direction."""
    shipped = relay()
    rows = questions("test", WORLDS, (HOPS,), count)
    cells = []
    for kind in KINDS:
        for seed in SEEDS if kind == "default" else SEEDS[:1]:
            system, words = linked(shipped, kind, seed)
            gains = round_gains(system, rows, seed)
            cell: dict[str, Any] = {"links": kind, "seed": seed, "gains": gains}
            if words:
                cell["entropy"] = {role: channel.entropy for role, channel in words.items()}
            cells.append(cell)
    return {"questions": {"count": count, "seed": WORLDS, "hops": HOPS}, "rounds": ROUNDS}, cells


def linked(shipped: RecursiveMAS, kind: str, seed: int) -> tuple[RecursiveMAS, Mapping[str, Worded]]:
    """The agents with links of this kind, and the text channels among them.

    "default" are drawn as a new system's, "identity" pass on what they get, "ridge" are linear least squares of what
    `recmas train` aligns, "trained" are the shipped ones. A text channel stands in place of inner links, with
    outer links that pass on.
    """
    if kind == "trained":
        return shipped, {}
    system, agents = relay_system(shipped.agents, seed), shipped.agents
    words = {role: Worded(agents[role]) for role in system.inner_links} if kind == "text" else {}
    if kind in ("text", "identity"):
        inner = words or {role: passing(agents[role], agents[role]) for role in system.inner_links}
        system.inner_links = dict(inner)  # type: ignore[arg-type]
        system.outer_links = {key: passing(agents[key[0]], agents[key[1]], outer=True) for key in system.outer_links}
    elif kind == "ridge":
        # A step so small that it changes nothing: the fit is where training would begin.
        stage: dict[str, Any] = {"link_init": "ridge", "steps": 1, "learning_rate": 1e-12, "rounds": (1, 2, 3)}
        stage |= {"batch_size": 64, "warmup_steps": 0, "seed": seed}
        train_inner(system, TASK.training_rows(seed, 64), InnerConfig(**stage), progress=False)
        train_warmup(system, TASK.training_rows(seed, 64), WarmupConfig(**stage), progress=False)
    return system, words


def round_gains(system: RecursiveMAS, rows: list[dict[str, object]], seed: int) -> list[list[float]]:
    """Of what the first agent sends, by round that a gradient goes back through, from the last one on."""
    first, sent = system.pattern.stages[0][0], []
    for turn in system.walk(rows, ROUNDS):
        role = turn.visit.role
        steps = system.steps_by_role(None)[role]
        turn.message = system.agents[role].think(turn.prompt, steps, system.inner_links[role])
        if role == first:
            if not sent:  # the graph begins here
                turn.message = Latents(turn.message.states.detach().requires_grad_())
            sent.append(turn.message.states)
            if len(sent) == ROUNDS:
                break
    made = torch.Generator().manual_seed(seed)
    gains = []
    for after, before in zip(sent[:0:-1], sent[-2::-1], strict=True):
        found: list[float] = []
        for _ in range(DIRECTIONS):
            v = torch.randn(after.shape, generator=made)
            (back,) = torch.autograd.grad(after, before, v, retain_graph=True)
            found += (back.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)).tolist()
        gains.append([float(f"{gain:.4g}") for gain in found])
    return gains
