"""Products with frozen weights, from their panels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recmas_kernels.backends.cpu import readable
from recmas_kernels.backends.cpu.module import DEVICE, DTYPES, isa_in_use, kernels


def frozen_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, stored: torch.dtype) -> Tensor:
    """``x W^T + b`` for rows ``[..., in]`` in fp32 or the stored dtype, in x's dtype.

    ``panels`` may be the weight ``[out, in]`` itself, for up to `MOST_STREAMED` rows.
    """
    return _frozen(kernels().frozen_forward, x, stored, (panels, bias), out_features)


def frozen_linear_bwd(dy: Tensor, panels: Tensor, in_features: int, stored: torch.dtype) -> Tensor:
    """``dy W`` for rows ``[..., out]``, in dy's dtype."""
    return _frozen(kernels().frozen_backward, dy, stored, (panels,), in_features)


def _frozen(run: Any, rows: Tensor, stored: torch.dtype, weight: tuple[Tensor | None, ...], features: int) -> Tensor:
    result = torch.empty(*rows.shape[:-1], features, dtype=rows.dtype, device=DEVICE)
    if result.numel() == 0:
        return result
    settings = (isa_in_use(), torch.get_num_threads(), DTYPES[stored])
    if not run(*settings, rows, *weight, result):
        panels, *bias = weight
        if not run(*settings, rows.contiguous(), panels, *map(readable.vector, bias), result):
            raise AssertionError("converted tensors are readable")
    return result
