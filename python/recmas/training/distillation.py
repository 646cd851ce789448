"""Distillation: the learner's latents are drawn toward the expert's, where the learner reads those.

The learner is the agent that answers, the expert the one agent of the stage before. The expert's latents E_k of round k
pass their outer link into the learner's space, where its own latents L_k of the same round are, too. Over the rounds k
in which the learner sends, all rows, and the positions j that both messages have, the loss is

    mean_kj  1 - cos(L_kj, R_out(E_kj))

Its gradient goes through L alone: into what the learner read before it thought, not into the target. A run of one round
has no such term: there the learner only writes. The reference implementation has no such loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from recmas.agents.targets import target_tokens
from recmas.config.pattern import Visit, link_key
from recmas.engine.messages import Latents, run_link
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.config import OuterConfig, Source
from recmas.training.data import target_texts
from recmas_kernels import alignment_loss


def expert_of(system: System) -> str:
    """The agent whose latents the last agent is to think like.

    Raises:
        ValueError: the last agent reads nobody, or several agents.
    """
    pattern = system.pattern
    experts = pattern.stages[-2] if len(pattern.stages) > 1 else ()
    if len(experts) != 1:
        read = ", ".join(map(repr, experts)) or "nobody"
        raise ValueError(f"distill: needs one expert, but {pattern.last!r} reads {read} in the stage before its own")
    return experts[0]


def check_distill(system: System, config: OuterConfig) -> None:
    """Raise ValueError where a run that distills has nobody to learn from, or no latents to learn by."""
    if config.distill == 0:
        return
    steps = system.steps_by_role(config.latent_steps)
    for role in (expert_of(system), system.pattern.last):
        if steps[role] == 0:
            raise ValueError(f"distill: {role!r} has 0 latent steps, so there is nothing to compare")


def count_latents(
    system: System, rows: Sequence[Fields], rounds: int, steps: Mapping[str, int], latents: Source
) -> int:
    """Pairs of latents in the mean above; 0 in one round."""
    expert, learner = expert_of(system), system.pattern.last
    if latents == "rollout":
        return len(rows) * (rounds - 1) * min(steps[expert], steps[learner])
    pairs = 0
    for round in range(1, rounds):
        lengths = (
            [
                min(steps[role], len(tokens))
                for tokens in target_tokens(system.agents[role], target_texts(rows, role, round))
            ]
            for role in (expert, learner)
        )
        pairs += sum(map(min, *lengths))
    return pairs


def distill_loss(system: System, visit: Visit, expert: Latents, learner: Latents) -> torch.Tensor:
    """The sum (fp32 scalar) above for one visit of the learner; gradient to its latents only."""
    counts = torch.tensor(list(map(min, expert.counts(), learner.counts())), device=learner.states.device)
    most = int(counts.max())
    both = torch.arange(most, device=counts.device) < counts[:, None]
    key = link_key(system.outer_links, expert_of(system), visit.role, visit.round)
    with torch.no_grad():
        target = run_link(system.outer_links[key], expert.states[:, :most].to(counts.device)[both])
    return alignment_loss(learner.states[:, :most][both], target) * both.sum()
