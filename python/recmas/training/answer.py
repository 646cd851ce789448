"""Cross entropy of an answer: the LM head sees the positions that predict it, a few at a time, each of them once.

The head is the model's own, whatever it does to its logits, and may run from packed weights. torch's
``linear_cross_entropy`` reads a plain weight alone, and was no faster where it can be used (docs/how-to/train.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from recmas.agents.agent import Agent

LOGITS = {"cpu": 1 << 21}
"""Logits that are held together, by kind of device: of as many positions as that makes ..."""
MOST_LOGITS = 1 << 25
"""... elsewhere ..."""
LEAST_ROWS = 64
"""... but of at least so many, for whose sake the head's weights are read once more."""


def answer_loss(agent: Agent, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies (fp32 at least) of tokens ``ids`` ``[n]`` after final-norm ``hidden`` ``[n, d]``."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.stack([_cross_entropy(agent, *part) for part in _parts(agent, hidden, ids)]).sum()
    loss: torch.Tensor = _AnswerLoss.apply(hidden, ids, agent)
    return loss


class _AnswerLoss(torch.autograd.Function):
    """Takes the gradient in the forward, part by part: neither logits nor their gradients outlive their part."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, ids: torch.Tensor, agent: Agent) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for part, expected in _parts(agent, hidden.detach(), ids):
            with torch.enable_grad():
                logits = agent.logits(part.requires_grad_())
            slopes, loss = _slopes(logits.detach(), expected)
            gradients += torch.autograd.grad(logits, part, slopes)
            losses.append(loss)
            del logits, slopes  # before the next part makes its own
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None


def _parts(agent: Agent, hidden: torch.Tensor, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    held = LOGITS.get(hidden.device.type, MOST_LOGITS)
    rows = max(LEAST_ROWS, held // agent.vocabulary)
    count = max(1, math.ceil(len(ids) / rows))  # equal parts: a rest of few rows reads the head as the others do
    return list(zip(hidden.tensor_split(count), ids.tensor_split(count), strict=True))


def _cross_entropy(agent: Agent, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_exact(agent.logits(hidden)), ids, reduction="sum")


def _slopes(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the sum of cross entropies to its logits, and that sum; autograd would hold more such tables."""
    exact = _exact(logits)
    loss = F.cross_entropy(exact, ids, reduction="sum")
    slopes = exact.softmax(dim=-1)
    slopes[torch.arange(len(ids), device=ids.device), ids] -= 1
    return slopes.to(logits.dtype), loss


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
