"""Panels: weights in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recmas_kernels.backends import packing, pages
from recmas_kernels.backends.cpu.module import DEVICE, DTYPES, isa_in_use, kernels

MOST_STREAMED = 16  # csrc/cpu/stream.h, kStreamLimit: beyond, stored weights are summed in panel order anyway


def pack(weight: Tensor, layout: packing.Layout, memory: Callable[[int], Tensor] = pages.alone) -> Tensor:
    """A weight's panels for a compute dtype and an instruction set, in ``memory(bytes)``."""
    compute, isa = layout
    panels = memory(kernels().packed_bytes(isa, DTYPES[compute], *weight.shape))
    kernels().pack_weight(isa, torch.get_num_threads(), DTYPES[compute], weight, panels)
    return panels


def pack_frozen(weight: Tensor) -> Tensor:
    """Panels of a contiguous weight ``[out, in]``, in its own dtype."""
    return pack(weight, (weight.dtype, isa_in_use()), pages.together)


def unpack_frozen(panels: Tensor, out_features: int, in_features: int, stored: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` that `pack_frozen` made panels of, bit by bit."""
    weight = torch.empty(out_features, in_features, dtype=stored, device=DEVICE)
    kernels().unpack_weight(isa_in_use(), torch.get_num_threads(), panels, weight)
    return weight
