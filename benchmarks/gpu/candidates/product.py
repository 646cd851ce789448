"""A product with its epilogue, by pointers: any sizes, any strides, every device. `persistent` is the other kernel.

A program forms one tile, loads asynchronously where the device can, and masks what lies outside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.candidates import tiles
from benchmarks.gpu.candidates.epilogue import finish, place
from recmas_kernels.backends.triton.device import TRITON_DTYPES, dot_precision, within


class Product(NamedTuple):
    """``out = left right (+ more_left more_right)`` through the epilogue ``mode``; see `epilogue.finish`."""

    mode: int  # PLAIN, UP or SLOPE
    left: Tensor  # [rows, depth], last stride 1
    right: Tensor  # [depth, columns], one stride 1
    out: Tensor  # [rows, columns], contiguous, as pre and act
    more_left: Tensor | None = None  # [rows, more_depth]
    more_right: Tensor | None = None  # [more_depth, columns], strided as right
    bias: Tensor | None = None  # [columns]
    more_bias: Tensor | None = None  # [columns]
    addend: Tensor | None = None  # [rows, columns], last stride 1
    pre: Tensor | None = None
    act: Tensor | None = None
    tanh: bool = False
    sums: bool = False

    @property
    def turned(self) -> bool:
        """Whether right is stored as ``[columns, depth]``: an ``nn.Linear`` weight on the way forward."""
        return self.right.stride(0) == 1 and self.right.stride(1) != 1

    @property
    def more_depth(self) -> int:
        """Depth of the second pair, 0 without one."""
        return 0 if self.more_left is None else self.more_left.shape[1]

    def partials(self, config: tiles.MatmulConfig) -> Tensor | None:
        """float32 ``[row tiles, columns]`` for the column sums, if they are wanted."""
        if not self.sums:
            return None
        rows, columns = self.out.shape
        return torch.empty(triton.cdiv(rows, config.rows), columns, dtype=torch.float32, device=self.out.device)


@triton.jit
def _accumulate(
    total,
    left,
    right,
    row,
    column,
    live,
    inside,
    depth,
    left_stride,
    right_deep,
    right_across,
    PRECISION: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``total + left[row] right[:, column]`` over the whole depth; left and right are at the tile's first element."""
    step = tl.arange(0, DEPTH)
    left_tile = left + row[:, None] * left_stride + step[None, :]
    right_tile = right + step[:, None] * right_deep + column[None, :] * right_across
    for start in range(0, depth, DEPTH):
        deep = within(start + step, depth, WHOLE_DEPTH)
        a = tl.load(left_tile, mask=live[:, None] & deep[None, :], other=0.0)
        b = tl.load(right_tile, mask=deep[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_tile += DEPTH
        right_tile += DEPTH * right_deep
    return total


@triton.jit(do_not_specialize=["rows"])
def _product(
    left,  # [rows, depth]
    right,  # element (k, n) at k * right_deep + n * right_across
    more_left,  # [rows, more_depth] or None
    more_right,  # as right, or None
    bias,
    more_bias,
    addend,
    pre,
    act,
    out,
    partials,  # see `epilogue.finish` for these seven
    rows,
    columns,
    depth,
    more_depth,
    left_stride,
    right_deep,
    right_across,
    more_left_stride,
    more_right_deep,
    more_right_across,
    addend_stride,
    MODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    # Tiles start at 64-bit bases and are indexed in 32 bits inside, which halves the registers that addresses take.
    first_row = tl.cast(row_tile, tl.int64) * ROWS
    first_column = tl.cast(column_tile, tl.int64) * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < rows - first_row
    inside = within(column, columns - first_column, WHOLE_COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = _accumulate(
        total, left + first_row * left_stride, right + first_column * right_across, row, column, live, inside,
        depth, left_stride, right_deep, right_across, PRECISION, WHOLE_DEPTH, DEPTH,
    )  # fmt: skip
    if more_left is not None:
        total = _accumulate(
            total, more_left + first_row * more_left_stride, more_right + first_column * more_right_across, row, column,
            live, inside, more_depth, more_left_stride, more_right_deep, more_right_across, PRECISION, WHOLE_DEPTH,
            DEPTH,
        )  # fmt: skip
    finish(
        total, bias, more_bias, addend, pre, act, out, partials, row_tile, column_tile, rows, columns, addend_stride,
        MODE, COMPUTE, TANH, WHOLE_COLUMNS, False,
    )  # fmt: skip


def launch(product: Product, config: tiles.MatmulConfig) -> Tensor | None:
    """Fill ``out`` (and pre or act); returns the float32 column sums if they are wanted."""
    left, right, more_left, more_right = product.left, product.right, product.more_left, product.more_right
    rows, columns = product.out.shape
    depth, more_depth = left.shape[1], product.more_depth
    partials = product.partials(config)
    _product[(tiles.tiles(rows, columns, config),)](
        left,
        right,
        more_left,
        more_right,
        product.bias,
        product.more_bias,
        product.addend,
        product.pre,
        product.act,
        product.out,
        partials,
        rows,
        columns,
        depth,
        more_depth,
        left.stride(0),
        right.stride(0),
        right.stride(1),
        0 if more_left is None else more_left.stride(0),
        0 if more_right is None else more_right.stride(0),
        0 if more_right is None else more_right.stride(1),
        0 if product.addend is None else product.addend.stride(0),
        MODE=product.mode,
        COMPUTE=TRITON_DTYPES[left.dtype],
        TANH=product.tanh,
        PRECISION=dot_precision(left.dtype),
        WHOLE_DEPTH=depth % config.depth == 0 and more_depth % config.depth == 0,
        WHOLE_COLUMNS=columns % config.columns == 0,
        **config.options(),
    )
    return None if partials is None else partials.sum(0)
