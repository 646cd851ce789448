"""A cell of the GPU suites in which a random agent takes steps after a prompt, latent ones or tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.models import random_agent
from recmas.agents.agent import Agent

DTYPE = torch.bfloat16
_STEPS = {"rollout": "m", "decode": "n"}


@dataclass(frozen=True)
class AgentCase:
    """A cell.

    Attributes:
        op: "rollout" or "decode".
        layers, features, vocabulary: of the agent.
        prompt: its positions.
        steps: latent steps or tokens.
        batch: rows.
        rank: of importance, the lowest first.
        seconds: that the cell is expected to take.
    """

    op: str
    layers: int
    features: int
    vocabulary: int
    prompt: int
    steps: int
    batch: int
    rank: int
    seconds: float

    @property
    def id(self) -> str:
        model, steps = f"{self.layers}x{self.features}", f"{_STEPS[self.op]}{self.steps}"
        return f"gpu-{self.op}-{model}-t{self.prompt}-{steps}-B{self.batch}"

    def agent(self, device: torch.device, dtype: torch.dtype = DTYPE) -> Agent:
        return random_agent(self.layers, self.features, self.vocabulary).to(device, dtype)
