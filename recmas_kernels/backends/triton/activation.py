"""GELU over ``[tokens, hidden]``: forward, and backward with the column sums of the bias gradient.

Bound by bytes. The backward writes the activation again beside its gradient, so that only the pre-activation is ever
saved. Column sums are formed in two stages, a partial per block of tokens and then a sum over blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels.backends.triton.device import gelu, gelu_and_slope

TILE_TOKENS, TILE_COLUMNS, WARPS = 16, 256, 8
SUM_BLOCKS = 64  # blocks of tokens in the backward, times hidden / 256 tiles across


@triton.jit(do_not_specialize=["tokens"])
def _activate(
    pre,  # [T, columns]
    out,  # [T, columns]; may be pre
    tokens,
    columns,
    pre_stride,
    out_stride,
    TANH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS))[:, None]
    column = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
    inside = (row < tokens) & (column < columns)
    value = tl.load(pre + row * pre_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, gelu(value, TANH), mask=inside)


def activate(pre: Tensor, out: Tensor, approximate: str) -> None:
    """``out = gelu(pre)``, both ``[T, hidden]`` with any row stride; ``out`` may be ``pre``."""
    tokens, columns = pre.shape
    _activate[(triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(columns, TILE_COLUMNS))](
        pre,
        out,
        tokens,
        columns,
        pre.stride(0),
        out.stride(0),
        TANH=approximate == "tanh",
        TILE_TOKENS=TILE_TOKENS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["tokens"])
def _activate_backward(
    dact,  # [T, columns] contiguous; may be dpre
    pre,  # [T, columns] contiguous
    dpre,  # [T, columns] contiguous
    act,  # [T, columns] contiguous, or None
    partials,  # float32 [blocks, columns] or None
    tokens,
    columns,
    TANH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    lane = tl.arange(0, TILE_TOKENS)
    total = tl.zeros([TILE_TOKENS, TILE_COLUMNS], tl.float32)
    for start in range(block * TILE_TOKENS, tokens, blocks * TILE_TOKENS):
        row = (tl.cast(start, tl.int64) + lane)[:, None]
        inside = (row < tokens) & (column < columns)[None, :]
        place = row * columns + column[None, :]
        value, slope = gelu_and_slope(tl.load(pre + place, mask=inside, other=0.0).to(tl.float32), TANH)
        grad = tl.load(dact + place, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(dpre + place, grad, mask=inside)
        if act is not None:
            tl.store(act + place, value, mask=inside)
        total += grad
    if partials is not None:
        tl.store(partials + block.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)


def activate_backward(
    dact: Tensor, pre: Tensor, dpre: Tensor, act: Tensor | None, approximate: str, *, sums: bool
) -> Tensor | None:
    """``dpre = dact * gelu'(pre)`` and, if given, ``act = gelu(pre)``; all ``[T, hidden]`` contiguous.

    ``dpre`` may be ``dact``. With ``sums``, returns the float32 column sums ``[hidden]`` of dpre.
    """
    tokens, columns = pre.shape
    blocks = min(SUM_BLOCKS, triton.cdiv(tokens, TILE_TOKENS)) if sums else triton.cdiv(tokens, TILE_TOKENS)
    partials = torch.empty(blocks, columns, dtype=torch.float32, device=pre.device) if sums else None
    _activate_backward[(blocks, triton.cdiv(columns, TILE_COLUMNS))](
        dact,
        pre,
        dpre,
        act,
        partials,
        tokens,
        columns,
        TANH=approximate == "tanh",
        TILE_TOKENS=TILE_TOKENS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=WARPS,
    )
    return None if partials is None else partials.sum(0)
