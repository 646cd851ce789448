"""What works on one row after the other: norms, and the handoff of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels.backends.cpu.module import DEVICE, isa_in_use, kernels


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) (offset + weight)`` over the last dimension of ``x [..., n]``, in its dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    if y.numel() == 0:
        return y
    run, settings = kernels().rms_norm, (isa_in_use(), torch.get_num_threads())
    if not run(*settings, x, weight, offset, eps, y) and not run(*settings, x.contiguous(), weight, offset, eps, y):
        raise AssertionError("contiguous rows are readable")
    return y


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]``, slot_rows int64 unique."""
    rows = rows.to(embeds.dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    kernels().handoff_scatter(rows, slot_rows.contiguous(), embeds)


def handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    """A copy of embeds ``[R, d]`` with ``copy[slot_rows[i]] = rows[i]``."""
    out = embeds.clone(memory_format=torch.contiguous_format)
    handoff_(rows, out, slot_rows)
    return out


def handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(drows [n, d], dembeds [R, d])``: the slot rows of dy, and dy with those rows zeroed."""
    slots = slot_rows.contiguous()
    dembeds = dy.clone(memory_format=torch.contiguous_format)
    drows = dy.new_empty(slots.shape[0], dy.shape[1])
    kernels().handoff_take(dembeds, slots, drows)
    return drows, dembeds
