"""Kernels over whole rows, one row in the registers of one program: LayerNorm with the residual, and its backward.

Each is bound by bytes: every operand is read once and every result written once. Sums over tokens are formed in two
stages, one partial per program and then a sum over programs, whose number depends on the token count alone: same
inputs, same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels.backends.triton.device import TRITON_DTYPES

IN, OUT = 0, 2  # first row of a norm's mean and rstd among a link's statistics [4, T]
PROGRAMS = 256  # of the backward: about two per SM of a large GPU, and 256 partials to add up


def row_block(width: int) -> tuple[int, int]:
    """``(BLOCK, num_warps)`` for rows of ``width``: at most 16 elements of each operand per thread."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


@triton.jit(do_not_specialize=["tokens"])
def _normalise(
    rows,  # [T, width], any dtype
    addend,  # [T, width] or None: added to the row first
    plain,  # [T, width] or None: receives the row (with the addend) in the compute dtype
    normed,  # [T, width] or None: receives the LayerNorm of the row; without a weight, the row itself
    weight,  # [width] or None
    bias,  # [width] or None
    stats,  # float32 [4, T] or None; rows of it would be aligned or not by the number of tokens
    tokens,
    width,
    eps,
    rows_stride,
    addend_stride,
    plain_stride,
    normed_stride,
    SIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(rows + row * rows_stride + columns, mask=inside, other=0.0).to(COMPUTE).to(tl.float32)
    if addend is not None:
        more = tl.load(addend + row * addend_stride + columns, mask=inside, other=0.0)
        value = (value + more.to(COMPUTE).to(tl.float32)).to(COMPUTE).to(tl.float32)
    if plain is not None:
        tl.store(plain + row * plain_stride + columns, value, mask=inside)
    if weight is not None:
        mean = tl.sum(value, 0) / width
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 0) / width + eps)
        value = centred * rstd * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        if stats is not None:
            place = stats + SIDE * tokens.to(tl.int64) + row
            tl.store(place, mean)
            tl.store(place + tokens, rstd)
    if normed is not None:
        tl.store(normed + row * normed_stride + columns, value.to(COMPUTE), mask=inside)


def normalise(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    addend: Tensor | None = None,
    plain: Tensor | None = None,
    normed: Tensor | None = None,
    stats: Tensor | None = None,
    side: int = IN,
) -> None:
    """One pass: ``plain = rows + addend`` and ``normed = LayerNorm(rows + addend)``, each if given.

    All ``[T, width]`` of any float dtype and row stride; arithmetic is float32, the sum is rounded to ``dtype``.
    ``stats``, float32 ``[4, T]``, receives mean and rstd from row ``side`` on. ``plain`` may be ``rows`` itself.
    """
    tokens, width = rows.shape
    block, warps = row_block(width)
    _normalise[(tokens,)](
        rows,
        addend,
        plain,
        normed,
        weight,
        bias,
        stats,
        tokens,
        width,
        eps,
        rows.stride(0),
        0 if addend is None else addend.stride(0),
        0 if plain is None else plain.stride(0),
        0 if normed is None else normed.stride(0),
        SIDE=side,
        COMPUTE=TRITON_DTYPES[dtype],
        BLOCK=block,
        num_warps=warps,
    )


@triton.jit(do_not_specialize=["tokens"])
def _normalise_backward(
    dout,  # [T, width]: the gradient of the LayerNorm's output
    rows,  # [T, width]: the LayerNorm's input
    stats,  # float32 [4, T]
    weight,  # [width]
    bias,  # [width] or None; read only for normed
    addend,  # [T, width] or None: a gradient that reached the input by another way
    drows,  # [T, width] or None, contiguous
    normed,  # [T, width] or None, contiguous: the LayerNorm's output, again
    partials,  # float32 [2 or 3, programs, width] or None: sums of dout*xhat, dout (and drows) over a program's tokens
    tokens,
    width,
    dout_stride,
    rows_stride,
    addend_stride,
    SIDE: tl.constexpr,
    TOTAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(program, tokens, programs):
        row = tl.cast(index, tl.int64)
        grad = tl.load(dout + row * dout_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(rows + row * rows_stride + columns, mask=inside, other=0.0).to(COMPUTE).to(tl.float32)
        place = stats + SIDE * tokens.to(tl.int64) + row
        scale = tl.load(place + tokens)
        xhat = tl.where(inside, (value - tl.load(place)) * scale, 0.0)
        if normed is not None:
            out = xhat * gain
            if bias is not None:
                out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(normed + row * width + columns, out, mask=inside)
        if partials is not None:
            dweight += grad * xhat
            dbias += grad
        scaled = grad * gain
        dvalue = scale * (scaled - tl.sum(scaled, 0) / width - xhat * (tl.sum(scaled * xhat, 0) / width))
        if TOTAL:
            total += tl.where(inside, dvalue, 0.0)
        if drows is not None:
            if addend is not None:
                dvalue += tl.load(addend + row * addend_stride + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(drows + row * width + columns, dvalue, mask=inside)
    if partials is not None:
        corner = partials + program.to(tl.int64) * width + columns
        plane = programs.to(tl.int64) * width
        tl.store(corner, dweight, mask=inside)
        tl.store(corner + plane, dbias, mask=inside)
        if TOTAL:
            tl.store(corner + 2 * plane, total, mask=inside)


def normalise_backward(
    dout: Tensor,
    rows: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    side: int = IN,
    sums: bool,
    total: bool = False,
    addend: Tensor | None = None,
    drows: Tensor | None = None,
    normed: Tensor | None = None,
) -> Tensor | None:
    """One pass: ``drows = d LayerNorm(rows) + addend`` and ``normed = LayerNorm(rows)``, each if given (contiguous).

    With ``sums``, returns float32 ``[2, width]``, the gradients of weight and bias; with ``total`` as well, a third
    row, the column sums of drows without the addend. ``stats [4, T]`` holds mean and rstd from row ``side`` on.
    """
    tokens, width = rows.shape
    block, warps = row_block(width)
    programs = min(tokens, PROGRAMS)
    total = total and sums
    partials = torch.empty(2 + total, programs, width, dtype=torch.float32, device=rows.device) if sums else None
    _normalise_backward[(programs,)](
        dout,
        rows,
        stats,
        weight,
        bias,
        addend,
        drows,
        normed,
        partials,
        tokens,
        width,
        dout.stride(0),
        rows.stride(0),
        0 if addend is None else addend.stride(0),
        SIDE=side,
        TOTAL=total,
        COMPUTE=TRITON_DTYPES[dtype],
        BLOCK=block,
        num_warps=warps,
    )
    return None if partials is None else partials.sum(1)
