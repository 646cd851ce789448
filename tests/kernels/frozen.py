"""What the tests of frozen layers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_linear(in_features: int = 37, out_features: int = 53, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Frozen, of values that need all bits of the dtype."""
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def budget(dtype: torch.dtype, terms: int) -> float:
    """One rounding of the result, and float32 sums of so many terms of random sign."""
    return torch.finfo(dtype).eps + 16 * (terms + 16) ** 0.5 * torch.finfo(torch.float32).eps / 2
