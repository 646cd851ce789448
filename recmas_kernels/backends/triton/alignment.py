"""The alignment loss with its gather, and its gradient, in one pass over the rows.

Bound by bytes: a row of predictions and the table row that it is compared with are read once, the gradient is written
once. The loss of every row is kept and the rows are added up by torch, so the sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recmas_kernels import reference
from recmas_kernels.backends.triton.device import launching
from recmas_kernels.backends.triton.rows import row_block
from recmas_kernels.reference import COSINE_EPS

SCALED = 8192  # elements of a gradient that a program scales: few programs, where there is nothing to do


@triton.jit(do_not_specialize=["tokens", "table_rows"])
def _align(
    pred,  # [T, width]
    target,  # [table_rows, width]
    token_ids,  # int64 [T] or None: row t is compared with target row t
    mask,  # [T], any dtype, or None
    mask_total,  # float32 [1] or None: the sum of mask
    losses,  # float32 [T]: each row's share of the loss
    grad,  # [T, width] contiguous, in pred's dtype
    tokens,
    table_rows,
    width,
    pred_stride,
    target_stride,
    cosine_weight,
    mse_weight,
    embed_scale,
    COSINE_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if mask is not None:
        weight, whole = tl.load(mask + row).to(tl.float32), tl.load(mask_total)
        share = tl.where(whole > 0, weight / tl.where(whole > 0, whole, 1.0), 0.0)
    else:
        share = 1.0 / tokens.to(tl.float32)
    chosen = share > 0
    # A row that is masked out may hold anything: neither it nor its token id is followed.
    wanted = tl.where(chosen, width, 0)
    readable = wanted
    source = row
    if token_ids is not None:
        # An id outside the table makes the loss NaN instead of reading past it: the host cannot look without waiting.
        source = tl.load(token_ids + row)
        readable = tl.where(source >= 0, tl.where(source < table_rows, wanted, 0), 0)
    inside = columns < width
    p = tl.load(pred + row * pred_stride + columns, mask=columns < wanted, other=0.0).to(tl.float32)
    e = tl.load(target + source * target_stride + columns, mask=columns < readable, other=float("nan")).to(tl.float32)
    e = tl.where(inside, e * embed_scale, 0.0)

    norm_p = tl.sqrt_rn(tl.sum(p * p, 0))
    inverse = 1 / tl.maximum(norm_p, COSINE_EPS)
    inverse_e = 1 / tl.maximum(tl.sqrt_rn(tl.sum(e * e, 0)), COSINE_EPS)
    cosine = tl.sum(p * e, 0) * inverse * inverse_e
    # Below the clamp the denominator is a constant, so the radial part of the gradient vanishes.
    radial = tl.where(norm_p > COSINE_EPS, cosine * inverse * inverse, 0.0)
    difference = p - e
    loss = cosine_weight * (1 - cosine) + mse_weight * (tl.sum(difference * difference, 0) / width)
    row_grad = difference * (2 * mse_weight / width) - cosine_weight * (e * (inverse * inverse_e) - p * radial)
    tl.store(losses + row, tl.where(chosen, share * loss, 0.0))
    tl.store(grad + row * width + columns, tl.where(columns < wanted, share * row_grad, 0.0), mask=inside)


def alignment_fwd(
    pred: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    """``(loss, float32 scalar; its gradient [T, d] in pred's dtype)``; see `recmas_kernels.reference.alignment_fwd`."""
    tokens, width = pred.shape
    grad = torch.empty(tokens, width, dtype=pred.dtype, device=pred.device)
    if tokens == 0:
        return torch.zeros((), dtype=torch.float32, device=pred.device), grad
    losses = torch.empty(tokens, dtype=torch.float32, device=pred.device)
    block, warps = row_block(width)
    with launching("alignment_fwd", pred):
        _align[(tokens,)](
            pred,
            target,
            token_ids,
            mask,
            None if mask is None else mask.sum(dtype=torch.float32),
            losses,
            grad,
            tokens,
            target.shape[0],
            width,
            pred.stride(0),
            target.stride(0),
            cosine_weight,
            mse_weight,
            embed_scale,
            COSINE_EPS=COSINE_EPS,
            BLOCK=block,
            num_warps=warps,
        )
        return losses.sum(), grad


@triton.jit
def _scale(grad, by, elements, BLOCK: tl.constexpr):
    """``grad *= by`` in place; nothing is read or written where by is 1, as it is at the end of a loss of its own."""
    factor = tl.load(by).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < elements
        value = tl.load(grad + place, mask=inside).to(tl.float32)
        tl.store(grad + place, value * factor, mask=inside)


def alignment_bwd(grad: Tensor, dloss: Tensor) -> Tensor:
    """``grad`` itself, contiguous, times the scalar ``dloss``, which the host never waits for."""
    if not grad.is_contiguous():
        return reference.alignment_bwd(grad, dloss)
    if grad.numel() > 0:
        with launching("alignment_bwd", grad):
            _scale[(triton.cdiv(grad.numel(), SCALED),)](grad, dloss, grad.numel(), BLOCK=SCALED, num_warps=8)
    return grad
