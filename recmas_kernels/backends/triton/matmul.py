"""Products with the pointwise work of a link in their epilogues, for many tokens and a large hidden width.

`_product` is rows times a weight: bias and GELU on the way out (keeping the pre-activation), a second product added
along the depth ([a | x] [W2 | W3]^T without a joint buffer), the residual as the start of the accumulator, or the
derivative of GELU with the column sums of the bias gradient. `weight_gradients` computes up to three gradients in one
launch, so that their tiles share the last wave. Sums are float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels.backends.triton import plan, tuning
from recmas_kernels.backends.triton.device import TRITON_DTYPES, dot_precision, gelu, gelu_and_slope, quarters, within

PLAIN, UP, SLOPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_GROUP = tl.constexpr(8)  # rows of tiles that share the columns they read while those are in L2


@triton.jit
def _place(tile, row_tiles, column_tiles):
    """``(row tile, column tile)`` of a flat tile number, in groups of rows."""
    group = tile // (_GROUP * column_tiles)
    first = group * _GROUP
    height = tl.minimum(row_tiles - first, _GROUP)
    within = tile - group * _GROUP * column_tiles
    return first + within % height, within // height


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


@triton.jit
def _finish(
    total,
    bias,
    more_bias,
    pre,
    act,
    out,
    sums,
    base,
    first_column,
    live,
    columns,
    MODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    """The epilogue of a piece of the tile from ``first_column`` on; ``base`` is its first row's offset."""
    row = tl.arange(0, total.shape[0])
    column = tl.arange(0, total.shape[1])
    inside = within(column, columns - first_column, WHOLE_COLUMNS)
    both = live[:, None] & inside[None, :]
    base += first_column
    place = row[:, None] * columns + column[None, :]
    if bias is not None:
        total += tl.load(bias + first_column + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if more_bias is not None:
        total += tl.load(more_bias + first_column + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MODE == UP:
        rounded = total.to(COMPUTE)
        if pre is not None:
            tl.store(pre + base + place, rounded, mask=both)
        total = gelu(rounded.to(tl.float32), TANH)
    if MODE == SLOPE:
        value, slope = gelu_and_slope(tl.load(pre + base + place, mask=both, other=0.0).to(tl.float32), TANH)
        if act is not None:
            tl.store(act + base + place, value, mask=both)
        total *= slope  # zero in rows past the last token, so the sums may take them all
        if sums is not None:
            tl.store(sums + first_column + column, tl.sum(total, 0), mask=inside)
    tl.store(out + base + place, total, mask=both)


@triton.jit(do_not_specialize=["rows"])
def _product(
    left,  # [rows, depth]
    right,  # element (k, n) at k * right_deep + n * right_across
    more_left,  # [rows, more_depth] or None
    more_right,  # as right, or None
    bias,  # [columns] or None
    more_bias,  # [columns] or None
    addend,  # [rows, columns] or None: the accumulator's start
    pre,  # [rows, columns] contiguous: written by UP (or None), read by SLOPE
    act,  # [rows, columns] contiguous or None: gelu(pre), written by SLOPE
    out,  # [rows, columns] contiguous
    partials,  # float32 [row tiles, columns] or None: SLOPE's column sums
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
    row_tile, column_tile = _place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    # Tiles start at 64-bit bases and are indexed in 32 bits inside, which halves the registers that addresses take.
    first_row = tl.cast(row_tile, tl.int64) * ROWS
    first_column = tl.cast(column_tile, tl.int64) * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < rows - first_row
    inside = within(column, columns - first_column, WHOLE_COLUMNS)
    both = live[:, None] & inside[None, :]

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if addend is not None:
        start = addend + first_row * addend_stride + first_column
        total += tl.load(start + row[:, None] * addend_stride + column[None, :], mask=both, other=0.0).to(tl.float32)
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
    base = first_row * columns
    sums = None
    if partials is not None:
        sums = partials + tl.cast(row_tile, tl.int64) * columns
    # An epilogue over the whole tile at once would spill beside the accumulators.
    QUARTER: tl.constexpr = COLUMNS // 4
    piece0, piece1, piece2, piece3 = quarters(total)
    for index in tl.static_range(4):
        piece = piece0 if index == 0 else piece1 if index == 1 else piece2 if index == 2 else piece3
        _finish(
            piece, bias, more_bias, pre, act, out, sums, base, first_column + index * QUARTER, live, columns,
            MODE, COMPUTE, TANH, WHOLE_COLUMNS,
        )  # fmt: skip


def _launch(
    mode: int,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    more: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    more_bias: Tensor | None = None,
    addend: Tensor | None = None,
    pre: Tensor | None = None,
    act: Tensor | None = None,
    gelu: str = "none",
    sums: bool = False,
) -> Tensor | None:
    """``out = left right (+ more)``, right ``[depth, columns]`` of any strides. Returns the column sums if wanted."""
    rows, columns = out.shape
    depth, dtype = left.shape[1], left.dtype
    more_depth = 0 if more is None else more[0].shape[1]

    def launch(config: plan.MatmulConfig) -> Tensor | None:
        row_tiles = triton.cdiv(rows, config.rows)
        partials = torch.empty(row_tiles, columns, dtype=torch.float32, device=left.device) if sums else None
        _product[(row_tiles * triton.cdiv(columns, config.columns),)](
            left,
            right,
            None if more is None else more[0],
            None if more is None else more[1],
            bias,
            more_bias,
            addend,
            pre,
            act,
            out,
            partials,
            rows,
            columns,
            depth,
            more_depth,
            left.stride(0),
            right.stride(0),
            right.stride(1),
            0 if more is None else more[0].stride(0),
            0 if more is None else more[1].stride(0),
            0 if more is None else more[1].stride(1),
            0 if addend is None else addend.stride(0),
            MODE=mode,
            COMPUTE=TRITON_DTYPES[dtype],
            TANH=gelu == "tanh",
            PRECISION=dot_precision(dtype),
            WHOLE_DEPTH=depth % config.depth == 0 and more_depth % config.depth == 0,
            WHOLE_COLUMNS=columns % config.columns == 0,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        return None if partials is None else partials.sum(0)

    key = (mode, str(dtype), tuning.bucket(rows), columns, depth, more_depth, right.stride(0) == 1)
    options = plan.matmul_configs([(rows, columns)], dtype, left.device, wide=mode != SLOPE.value)
    return launch(tuning.choose("product", key, left.device, options, launch))


def up(u: Tensor, w1: Tensor, b1: Tensor | None, gelu: str, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``(gelu(pre), pre)`` with ``pre = u w1^T + b1 [T, hidden]``; pre is None unless it is kept."""
    act = torch.empty(u.shape[0], w1.shape[0], dtype=u.dtype, device=u.device)
    pre = torch.empty_like(act) if keep else None
    _launch(UP.value, u, w1.to(u.dtype).t(), act, bias=b1, pre=pre, gelu=gelu)
    return act, pre


def down(
    act: Tensor,
    raw: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    residual: str,
) -> Tensor:
    """``z = act w2^T + b2 + (raw | raw w3^T + b3 | 0) [T, out]``."""
    z = torch.empty(act.shape[0], w2.shape[0], dtype=act.dtype, device=act.device)
    more = None if w3 is None else (raw, w3.to(act.dtype).t())
    addend = raw if residual == "identity" else None
    _launch(PLAIN.value, act, w2.to(act.dtype).t(), z, more=more, bias=b2, more_bias=b3, addend=addend)
    return z


def hidden_gradient(
    dz: Tensor, w2: Tensor, pre: Tensor, act: Tensor | None, gelu: str, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``(dpre, its float32 column sums if asked for)``, ``dpre = (dz w2) * gelu'(pre)``; fills ``act`` if given."""
    dpre = torch.empty_like(pre)
    total = _launch(SLOPE.value, dz, w2.to(dz.dtype), dpre, pre=pre, act=act, gelu=gelu, sums=sums)
    return dpre, total


def input_gradient(
    dpre: Tensor, w1: Tensor, *, more: tuple[Tensor, Tensor] | None = None, addend: Tensor | None = None
) -> Tensor:
    """``dpre w1 (+ dz w3 as more) (+ dz as addend) [T, in]``."""
    du = torch.empty(dpre.shape[0], w1.shape[1], dtype=dpre.dtype, device=dpre.device)
    second = None if more is None else (more[0], more[1].to(dpre.dtype))
    _launch(PLAIN.value, dpre, w1.to(dpre.dtype), du, more=second, addend=addend)
    return du


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
    row_tile, column_tile = _place(tile, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
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

    def launch(config: plan.MatmulConfig) -> None:
        _weight_gradients[(sum(plan.tiles(out.shape[0], out.shape[1], config) for out in outs),)](
            *tensors,
            *[None] * 3 * absent,
            *sizes,
            *[0] * 4 * absent,
            first.shape[0],
            PRECISION=dot_precision(first.dtype),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    key = (str(first.dtype), tuning.bucket(first.shape[0]), *sizes)
    options = plan.matmul_configs([(out.shape[0], out.shape[1]) for out in outs], first.dtype, first.device)
    launch(tuning.choose("gradients", key, first.device, options, launch))
    return outs
