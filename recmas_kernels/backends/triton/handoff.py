"""The latent handoff: rows scattered into unique slots of an embedding table, and back. Bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels.backends.triton.device import launching

BLOCK = 1024


@triton.jit
def _scatter(
    rows,  # [n, width]
    embeds,  # [R, width]
    slot_rows,  # int64 [n], unique
    width,
    rows_stride,
    embeds_stride,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    slot = tl.load(slot_rows + index)
    value = tl.load(rows + index * rows_stride + columns, mask=inside)
    tl.store(embeds + slot * embeds_stride + columns, value, mask=inside)


@triton.jit
def _take(
    table,  # [R, width] contiguous; its slot rows become zero
    taken,  # [n, width] contiguous
    slot_rows,  # int64 [n], unique
    width,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = table + tl.load(slot_rows + index) * width + columns
    value = tl.load(place, mask=inside)
    tl.store(taken + index * width + columns, value, mask=inside)
    tl.store(place, tl.zeros_like(value), mask=inside)


def _grid(slot_rows: Tensor, width: int) -> tuple[int, int]:
    return slot_rows.shape[0], triton.cdiv(width, BLOCK)


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]``, unique slots."""
    if rows.numel() == 0:
        return
    width = embeds.shape[1]
    with launching("handoff_", embeds):
        _scatter[_grid(slot_rows, width)](
            rows, embeds, slot_rows.contiguous(), width, rows.stride(0), embeds.stride(0), BLOCK=BLOCK, num_warps=4
        )


def handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    """A copy of embeds ``[R, d]`` with ``copy[slot_rows[i]] = rows[i]``."""
    out = embeds.clone(memory_format=torch.contiguous_format)
    handoff_(rows, out, slot_rows)
    return out


def handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(drows [n, d], dembeds [R, d])``: the slot rows of dy, and dy with those rows zeroed."""
    dembeds = dy.clone(memory_format=torch.contiguous_format)
    drows = dy.new_empty(slot_rows.shape[0], dy.shape[1])
    if drows.numel() != 0:
        width = dy.shape[1]
        with launching("handoff_bwd", dy):
            _take[_grid(slot_rows, width)](dembeds, drows, slot_rows.contiguous(), width, BLOCK=BLOCK, num_warps=4)
    return drows, dembeds
