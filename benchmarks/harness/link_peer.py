"""A link's implementation as the gate and the timing call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recmas_kernels import RecursiveLink

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinkPeer:
    """An implementation: its forward and the module whose parameters it reads."""

    forward: Forward
    module: RecursiveLink

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of the rows that the forward takes."""
        return self.module.proj1.weight.dtype


def step(peer: LinkPeer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward and backward: ``y`` and the gradients of ``x`` and of every parameter, by name."""
    y = peer.forward(x)
    names, parameters = zip(*peer.module.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy)
    return {"y": y.detach(), **dict(zip(("x", *names), grads, strict=True))}
