"""The weight gradients of a link, up to three in one launch, so that their tiles share the last wave.

Sums over tokens are float32 in a fixed order, rounded once, to the weight's own dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.candidates import tiles
from benchmarks.gpu.candidates.epilogue import place
from recmas_kernels.backends.triton.device import dot_precision


@triton.jit(do_not_specialize=["tokens"])
def _weight_gradients(
    left0,  # [T, rows0]: three problems, the absent ones None
    right0,  # [T, columns0]
    out0,  # [rows0, columns0] contiguous
    left1,
    right1,
    out1,
    left2,
    right2,
    out2,
    rows0,
    columns0,
    left_stride0,
    right_stride0,
    rows1,
    columns1,
    left_stride1,
    right_stride1,
    rows2,
    columns2,
    left_stride2,
    right_stride2,
    tokens,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(0)
    left, right, out = left0, right0, out0
    rows, columns, left_stride, right_stride = rows0 + 0, columns0 + 0, left_stride0 + 0, right_stride0 + 0
    if left1 is not None:
        past = tl.cdiv(rows0, ROWS) * tl.cdiv(columns0, COLUMNS)
        if tile >= past:
            tile -= past
            left, right, out = left1, right1, out1
            rows, columns, left_stride, right_stride = rows1 + 0, columns1 + 0, left_stride1 + 0, right_stride1 + 0
            if left2 is not None:
                past1 = tl.cdiv(rows1, ROWS) * tl.cdiv(columns1, COLUMNS)
                if tile >= past1:
                    tile -= past1
                    left, right, out = left2, right2, out2
                    rows, columns = rows2 + 0, columns2 + 0
                    left_stride, right_stride = left_stride2 + 0, right_stride2 + 0
    row_tile, column_tile = place(tile, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < rows - row_tile * ROWS
    inside = column < columns - column_tile * COLUMNS
    step = tl.arange(0, DEPTH)
    left_tile = left + row_tile * ROWS + row[:, None] + step[None, :] * left_stride
    right_tile = right + column_tile * COLUMNS + step[:, None] * right_stride + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tokens, DEPTH):
        deep = start + step < tokens
        a = tl.load(left_tile, mask=live[:, None] & deep[None, :], other=0.0)
        b = tl.load(right_tile, mask=deep[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_tile += DEPTH * left_stride
        right_tile += DEPTH * right_stride
    corner = out + tl.cast(row_tile * ROWS, tl.int64) * columns + column_tile * COLUMNS
    tl.store(corner + row[:, None] * columns + column[None, :], total, mask=live[:, None] & inside[None, :])


def weight_gradients(problems: list[tuple[Tensor, Tensor, torch.dtype]]) -> list[Tensor]:
    """``left^T right`` of one to three ``(left [T, m], right [T, n], dtype of the result)``, in one launch."""
    outs = [torch.empty(a.shape[1], b.shape[1], dtype=dtype, device=a.device) for a, b, dtype in problems]
    first = problems[0][0]
    tensors: list[Tensor | None] = []
    sizes: list[int] = []
    for (left, right, _), out in zip(problems, outs, strict=True):
        tensors += [left, right, out]
        sizes += [*out.shape, left.stride(0), right.stride(0)]
    absent = 3 - len(problems)

    sizes_of = [(out.shape[0], out.shape[1]) for out in outs]
    config = tiles.choose(sizes_of, first.dtype, first.device, wide=True, described=False)
    _weight_gradients[(sum(tiles.tiles(*size, config) for size in sizes_of),)](
        *tensors,
        *[None] * 3 * absent,
        *sizes,
        *[0] * 4 * absent,
        first.shape[0],
        PRECISION=dot_precision(first.dtype),
        **config.options(),
    )
    return outs
