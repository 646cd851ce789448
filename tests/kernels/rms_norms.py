"""An RMSNorm as models have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recmas_kernels.testing import make_rows


class Norm(nn.Module):
    """As most models have it; ``offset`` 1 is Gemma's."""

    def __init__(self, features: int, offset: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(make_rows(features, seed=5), requires_grad=False)
        self.offset, self.eps = offset, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return ((self.offset + self.weight.float()) * unit).to(x.dtype)
