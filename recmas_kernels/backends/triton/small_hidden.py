"""The whole link in one kernel when the hidden width is small: the hidden tile never leaves the chip.

For a block of tokens the first product accumulates the hidden tile in registers, GELU turns it into the operand of the
second, whose result takes the residual and, with an output norm, is normalised after a second look at rows that this
program has just written. From memory x is read once and y written once, with any norms: the second and third reads
at a block of rows hit the L2 cache. So the kernel is bound by bytes where the separate products and passes would move
three to five times as many. Both weights are read once per block of tokens, out of L2: that traffic, tokens / block *
(in + out) * hidden elements, is what limits it for hidden widths above 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels.backends.triton import plan
from recmas_kernels.backends.triton.device import TRITON_DTYPES, dot_precision, gelu, gelu_and_slope, quarters, within


@triton.jit
def _merge(mean, spread, count, value, inside, columns):
    """Chan's update of row means and squared spreads by a tile ``value`` with ``columns`` columns inside."""
    tile_mean = tl.sum(tl.where(inside, value, 0.0), 1) / columns
    centred = tl.where(inside, value - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    whole = count + columns
    spread += tl.sum(centred * centred, 1) + delta * delta * (count * columns / whole)
    return mean + delta * (columns / whole), spread


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x,  # [T, in]
    w1,  # [hidden, in]
    b1,  # [hidden] or None
    w2,  # [out, hidden]
    b2,  # [out] or None
    gi,  # [in] or None
    ci,  # [in] or None
    go,  # [out] or None
    co,  # [out] or None
    y,  # [T, out] contiguous
    pre,  # [T, hidden] contiguous, or None
    z,  # [T, out] contiguous: the output norm's input; y itself where it is not needed afterwards
    stats,  # float32 [4, T] or None: mean_in, rstd_in, mean_out, rstd_out
    tokens,
    in_features,
    hidden_features,
    out_features,
    x_stride,
    eps,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    IDENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    # Tiles start at 64-bit bases and are indexed in 32 bits inside, which halves the registers that addresses take.
    first = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
    row = tl.arange(0, BLOCK_TOKENS)
    live = row < tokens - first
    x_rows = x + first * x_stride + row[:, None] * x_stride
    lane = tl.arange(0, BLOCK_HIDDEN)
    hidden_inside = within(lane, hidden_features, WHOLE)
    in_lane = tl.arange(0, BLOCK_IN)
    out_lane = tl.arange(0, BLOCK_OUT)
    plane = tl.cast(tokens, tl.int64)
    if gi is not None:
        mean = tl.zeros([BLOCK_TOKENS], tl.float32)
        spread = tl.zeros([BLOCK_TOKENS], tl.float32)
        for start in range(0, in_features, BLOCK_IN):
            inside = within(start + in_lane, in_features, WHOLE)[None, :]
            tile = tl.load(x_rows + start + in_lane[None, :], mask=live[:, None] & inside, other=0.0)
            columns = tl.minimum(in_features - start, BLOCK_IN).to(tl.float32)
            mean, spread = _merge(mean, spread, start * 1.0, tile.to(COMPUTE).to(tl.float32), inside, columns)
        rstd = 1 / tl.sqrt_rn(spread / in_features + eps)
        if stats is not None:
            tl.store(stats + first + row, mean, mask=live)
            tl.store(stats + plane + first + row, rstd, mask=live)

    hidden = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], tl.float32)
    w1_columns = w1 + lane[None, :] * in_features
    for start in range(0, in_features, BLOCK_IN):
        column = start + in_lane
        inside = within(column, in_features, WHOLE)
        u = tl.load(x_rows + column[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(COMPUTE)
        if gi is not None:
            gain = tl.load(gi + column, mask=inside, other=0.0).to(tl.float32)
            u = (u.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain[None, :]
            if ci is not None:
                u += tl.load(ci + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            u = tl.where(inside[None, :], u, 0.0).to(COMPUTE)
        weight = tl.load(w1_columns + column[:, None], mask=inside[:, None] & hidden_inside[None, :], other=0.0)
        hidden = tl.dot(u, weight, hidden, input_precision=PRECISION)
    if b1 is not None:
        hidden += tl.load(b1 + lane, mask=hidden_inside, other=0.0).to(tl.float32)[None, :]
    rounded = hidden.to(COMPUTE)
    if pre is not None:
        place = pre + first * hidden_features + row[:, None] * hidden_features + lane[None, :]
        tl.store(place, rounded, mask=live[:, None] & hidden_inside[None, :])
    act = gelu(rounded.to(tl.float32), TANH).to(COMPUTE)

    mean_out = tl.zeros([BLOCK_TOKENS], tl.float32)
    spread_out = tl.zeros([BLOCK_TOKENS], tl.float32)
    z_rows = z + first * out_features + row[:, None] * out_features
    for start in range(0, out_features, BLOCK_OUT):
        column = start + out_lane
        inside = within(column, out_features, WHOLE)
        both = live[:, None] & inside[None, :]
        w2_tile = w2 + column[None, :] * hidden_features + lane[:, None]
        weight = tl.load(w2_tile, mask=hidden_inside[:, None] & inside[None, :], other=0.0)
        tile = tl.dot(act, weight, input_precision=PRECISION)
        if b2 is not None:
            tile += tl.load(b2 + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if IDENTITY:
            tile += tl.load(x_rows + column[None, :], mask=both, other=0.0).to(COMPUTE).to(tl.float32)
        tile = tile.to(COMPUTE).to(tl.float32)
        tl.store(z_rows + column[None, :], tile, mask=both)
        if go is not None:
            columns = tl.minimum(out_features - start, BLOCK_OUT).to(tl.float32)
            mean_out, spread_out = _merge(mean_out, spread_out, start * 1.0, tile, inside[None, :], columns)

    if go is not None:
        rstd_out = 1 / tl.sqrt_rn(spread_out / out_features + eps)
        if stats is not None:
            tl.store(stats + 2 * plane + first + row, mean_out, mask=live)
            tl.store(stats + 3 * plane + first + row, rstd_out, mask=live)
        tl.debug_barrier()  # other threads of this program wrote the z that is read here
        y_rows = y + first * out_features + row[:, None] * out_features
        for start in range(0, out_features, BLOCK_OUT):
            column = start + out_lane
            inside = within(column, out_features, WHOLE)
            both = live[:, None] & inside[None, :]
            gain = tl.load(go + column, mask=inside, other=0.0).to(tl.float32)
            tile = tl.load(z_rows + column[None, :], mask=both, other=0.0).to(tl.float32)
            tile = (tile - mean_out[:, None]) * rstd_out[:, None] * gain[None, :]
            if co is not None:
                tile += tl.load(co + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(y_rows + column[None, :], tile.to(COMPUTE), mask=both)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gi: Tensor | None,
    ci: Tensor | None,
    go: Tensor | None,
    co: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    z: Tensor,
    stats: Tensor | None,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
) -> None:
    """Fill ``y``, ``z`` (the same tensor, or one in ``dtype``), ``pre`` and ``stats`` (if kept); residual not "linear".

    x ``[T, in]`` of any row stride; everything written is contiguous; stats is float32 ``[4, T]``.
    """
    tokens, in_features = x.shape
    hidden_features, out_features = w1.shape[0], w2.shape[0]
    config = plan.small_config(block_hidden(hidden_features), dtype, x.device, backward=False)
    _forward[(triton.cdiv(tokens, config.tokens),)](
        x,
        w1.to(dtype),
        b1,
        w2.to(dtype),
        b2,
        gi,
        ci,
        go,
        co,
        y,
        pre,
        z,
        stats,
        tokens,
        in_features,
        hidden_features,
        out_features,
        x.stride(0),
        eps,
        COMPUTE=TRITON_DTYPES[dtype],
        TANH=gelu == "tanh",
        IDENTITY=residual == "identity",
        PRECISION=dot_precision(dtype),
        WHOLE=_whole(w1, w2, config),
        BLOCK_TOKENS=config.tokens,
        BLOCK_HIDDEN=block_hidden(hidden_features),
        BLOCK_IN=config.columns,
        BLOCK_OUT=config.columns,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _whole(w1: Tensor, w2: Tensor, config: plan.SmallConfig) -> bool:
    """Whether no tile reaches past the features; tokens may still end inside a block."""
    hidden_features, in_features = w1.shape
    ragged = in_features % config.columns or w2.shape[0] % config.columns
    return not ragged and block_hidden(hidden_features) == hidden_features


def block_hidden(hidden_features: int) -> int:
    """The hidden tile's width: a power of two whose quarters, at least 16 wide, are operands of ``tl.dot``."""
    return max(64, triton.next_power_of_2(hidden_features))


@triton.jit
def _slope(
    dact,
    pre,
    dpre,
    act,
    sums,
    base,
    first_column: tl.constexpr,
    live,
    hidden_features,
    TANH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A piece of ``dpre = dact gelu'(pre)``, stored and returned; its activation and column sums too, if wanted."""
    row = tl.arange(0, dact.shape[0])
    column = first_column + tl.arange(0, dact.shape[1])
    inside = within(column, hidden_features, WHOLE)
    both = live[:, None] & inside[None, :]
    place = row[:, None] * hidden_features + column[None, :]
    before = tl.load(pre + base + place, mask=both, other=0.0)
    value, slope = gelu_and_slope(before.to(tl.float32), TANH)
    if act is not None:
        tl.store(act + base + place, value, mask=both)
    grad = dact * slope  # zero in rows past the last token, so the sums may take them all
    if sums is not None:
        tl.store(sums + column, tl.sum(grad, 0), mask=inside)
    rounded = grad.to(before.dtype)
    tl.store(dpre + base + place, rounded, mask=both)
    return rounded


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    dz,  # [T, out] contiguous
    pre,  # [T, hidden] contiguous
    w1,  # [hidden, in]
    w2,  # [out, hidden]
    dpre,  # [T, hidden] contiguous
    act,  # [T, hidden] contiguous, or None
    du,  # [T, in] contiguous, or None
    partials,  # float32 [programs, hidden] or None: column sums of dpre
    tokens,
    in_features,
    hidden_features,
    out_features,
    TANH: tl.constexpr,
    ADD_DZ: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK_TOKENS
    row = tl.arange(0, BLOCK_TOKENS)
    live = row < tokens - first
    lane = tl.arange(0, BLOCK_HIDDEN)
    hidden_inside = within(lane, hidden_features, WHOLE)
    in_lane = tl.arange(0, BLOCK_IN)
    out_lane = tl.arange(0, BLOCK_OUT)
    QUARTER: tl.constexpr = BLOCK_HIDDEN // 4
    dz_rows = dz + first * out_features + row[:, None] * out_features

    dact = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], tl.float32)
    for start in range(0, out_features, BLOCK_OUT):
        column = start + out_lane
        inside = within(column, out_features, WHOLE)
        grad = tl.load(dz_rows + column[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        w2_tile = w2 + column[:, None] * hidden_features + lane[None, :]
        weight = tl.load(w2_tile, mask=inside[:, None] & hidden_inside[None, :], other=0.0)
        dact = tl.dot(grad, weight, dact, input_precision=PRECISION)
    dact0, dact1, dact2, dact3 = quarters(dact)
    base = first * hidden_features
    sums = None
    if partials is not None:
        sums = partials + program * hidden_features
    dpre0 = _slope(dact0, pre, dpre, act, sums, base, 0, live, hidden_features, TANH, WHOLE)
    dpre1 = _slope(dact1, pre, dpre, act, sums, base, QUARTER, live, hidden_features, TANH, WHOLE)
    dpre2 = _slope(dact2, pre, dpre, act, sums, base, 2 * QUARTER, live, hidden_features, TANH, WHOLE)
    dpre3 = _slope(dact3, pre, dpre, act, sums, base, 3 * QUARTER, live, hidden_features, TANH, WHOLE)

    if du is not None:
        du_rows = du + first * in_features + row[:, None] * in_features
        for start in range(0, in_features, BLOCK_IN):
            column = start + in_lane
            inside = within(column, in_features, WHOLE)
            both_in = live[:, None] & inside[None, :]
            tile = tl.zeros([BLOCK_TOKENS, BLOCK_IN], tl.float32)
            for index in tl.static_range(4):
                piece = dpre0 if index == 0 else dpre1 if index == 1 else dpre2 if index == 2 else dpre3
                deep = index * QUARTER + tl.arange(0, QUARTER)
                mask = within(deep, hidden_features, WHOLE)[:, None] & inside[None, :]
                weight = tl.load(w1 + deep[:, None] * in_features + column[None, :], mask=mask, other=0.0)
                tile = tl.dot(piece, weight, tile, input_precision=PRECISION)
            if ADD_DZ:
                tile += tl.load(dz_rows + column[None, :], mask=both_in, other=0.0).to(tl.float32)
            tl.store(du_rows + column[None, :], tile, mask=both_in)


def backward(
    dz: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    dpre: Tensor,
    act: Tensor | None,
    du: Tensor | None,
    gelu: str,
    dtype: torch.dtype,
    *,
    sums: bool,
    add_dz: bool,
) -> Tensor | None:
    """From ``dz [T, out]``: ``dpre``, ``act`` and ``du = dpre w1 (+ dz)``, each if given, all contiguous.

    With ``sums``, returns the float32 column sums ``[hidden]`` of dpre.
    """
    tokens, out_features = dz.shape
    hidden_features, in_features = w1.shape
    config = plan.small_config(block_hidden(hidden_features), dtype, dz.device, backward=True)
    programs = triton.cdiv(tokens, config.tokens)
    partials = torch.empty(programs, hidden_features, dtype=torch.float32, device=dz.device) if sums else None
    _backward[(programs,)](
        dz,
        pre,
        w1.to(dtype),
        w2.to(dtype),
        dpre,
        act,
        du,
        partials,
        tokens,
        in_features,
        hidden_features,
        out_features,
        TANH=gelu == "tanh",
        ADD_DZ=add_dz,
        PRECISION=dot_precision(dtype),
        WHOLE=_whole(w1, w2, config),
        BLOCK_TOKENS=config.tokens,
        BLOCK_HIDDEN=block_hidden(hidden_features),
        BLOCK_IN=config.columns,
        BLOCK_OUT=config.columns,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return None if partials is None else partials.sum(0)
