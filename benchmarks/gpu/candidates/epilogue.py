"""What a product's tile goes through between its accumulators and memory, for every kernel that forms products.

Bias and GELU on the way out (keeping the pre-activation), the residual, or the derivative of GELU with the column sums
of the bias gradient: in float32, rounded once. Tiles lie in memory behind pointers, or behind tensor descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recmas_kernels.backends.triton.device import gelu, gelu_and_slope, quarters, within

PLAIN, UP, SLOPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_GROUP = tl.constexpr(8)  # rows of tiles that share the columns they read while those are in L2


@triton.jit
def place(tile, row_tiles, column_tiles):
    """``(row tile, column tile)`` of a flat tile number, in groups of rows."""
    group = tile // (_GROUP * column_tiles)
    first = group * _GROUP
    height = tl.minimum(row_tiles - first, _GROUP)
    inner = tile - group * _GROUP * column_tiles
    return first + inner % height, inner // height


@triton.jit
def _read(source, row_tile, first_column, stride, both, DESCRIBED: tl.constexpr):
    """The piece from ``(row_tile, first_column)`` on, of the shape of ``both``, in float32."""
    ROWS: tl.constexpr = both.shape[0]
    if DESCRIBED:
        piece = source.load([row_tile * ROWS, first_column])
    else:
        corner = source + tl.cast(row_tile, tl.int64) * ROWS * stride + first_column
        offset = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, both.shape[1])[None, :]
        piece = tl.load(corner + offset, mask=both, other=0.0)
    return piece.to(tl.float32)


@triton.jit
def _write(target, value, row_tile, first_column, stride, both, COMPUTE: tl.constexpr, DESCRIBED: tl.constexpr):
    """Store ``value``, rounded to the compute dtype, as the piece from ``(row_tile, first_column)`` on."""
    ROWS: tl.constexpr = both.shape[0]
    if DESCRIBED:
        target.store([row_tile * ROWS, first_column], value.to(COMPUTE))
    else:
        corner = target + tl.cast(row_tile, tl.int64) * ROWS * stride + first_column
        offset = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, both.shape[1])[None, :]
        tl.store(corner + offset, value.to(COMPUTE), mask=both)


@triton.jit
def _finish_piece(
    total,
    bias,
    more_bias,
    addend,
    pre,
    act,
    out,
    partials,
    row_tile,
    first_column,
    live,
    columns,
    addend_stride,
    MODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    column = tl.arange(0, total.shape[1])
    inside = within(column, columns - first_column, WHOLE_COLUMNS)
    both = live[:, None] & inside[None, :]
    if bias is not None:
        total += tl.load(bias + first_column + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if more_bias is not None:
        total += tl.load(more_bias + first_column + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if addend is not None:
        total += _read(addend, row_tile, first_column, addend_stride, both, DESCRIBED)
    if MODE == UP:
        rounded = total.to(COMPUTE)
        if pre is not None:
            _write(pre, rounded, row_tile, first_column, columns, both, COMPUTE, DESCRIBED)
        total = gelu(rounded.to(tl.float32), TANH)
    if MODE == SLOPE:
        value, slope = gelu_and_slope(_read(pre, row_tile, first_column, columns, both, DESCRIBED), TANH)
        if act is not None:
            _write(act, value, row_tile, first_column, columns, both, COMPUTE, DESCRIBED)
        total *= slope  # zero in rows past the last token, so the sums may take them all
        if partials is not None:
            sums = partials + tl.cast(row_tile, tl.int64) * columns + first_column
            tl.store(sums + column, tl.sum(total, 0), mask=inside)
    _write(out, total, row_tile, first_column, columns, both, COMPUTE, DESCRIBED)


@triton.jit
def finish(
    total,  # float32 [ROWS, COLUMNS]: the product's tile
    bias,  # [columns] or None
    more_bias,  # [columns] or None
    addend,  # [rows, columns] or None: the residual
    pre,  # [rows, columns] contiguous: written by UP (or None), read by SLOPE
    act,  # [rows, columns] contiguous or None: gelu(pre), written by SLOPE
    out,  # [rows, columns] contiguous
    partials,  # float32 [row tiles, columns] or None: SLOPE's column sums
    row_tile,
    column_tile,
    rows,
    columns,
    addend_stride,
    MODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Finish the tile at ``(row_tile, column_tile)``, a quarter of its columns after the other.

    The whole tile at once would spill beside its accumulators. ``DESCRIBED``: addend, pre, act and out are tensor
    descriptors of blocks of a quarter's shape.
    """
    QUARTER: tl.constexpr = total.shape[1] // 4
    live = tl.arange(0, total.shape[0]) < rows - row_tile * total.shape[0]
    piece0, piece1, piece2, piece3 = quarters(total)
    for index in tl.static_range(4):
        piece = piece0 if index == 0 else piece1 if index == 1 else piece2 if index == 2 else piece3
        _finish_piece(
            piece, bias, more_bias, addend, pre, act, out, partials, row_tile, (column_tile * 4 + index) * QUARTER,
            live, columns, addend_stride, MODE, COMPUTE, TANH, WHOLE_COLUMNS, DESCRIBED,
        )  # fmt: skip
