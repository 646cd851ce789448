"""The ``autograd.Function``s around the ops: what is kept for the backward pass, and how gradients come back.

Incoming gradients are made contiguous; nothing that was given or saved is ever written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recmas_kernels import ops
from recmas_kernels.devices import reads_at_once
from recmas_kernels.observed import is_ordinary, observed
from recmas_kernels.reference import LinkArguments


class Link(torch.autograd.Function):
    """``apply(direct, recompute, *LinkArguments) -> y [T, out]``; see `ops.link_fwd_train` and ``recompute`` there."""

    @staticmethod
    def forward(ctx: Any, direct: bool, recompute: bool, *values: Any) -> Tensor:
        y, *intermediates = ops.link_fwd_train(LinkArguments._make(values), direct)
        if recompute:
            intermediates.clear()
        ctx.save_for_backward(*values[:11], *intermediates)
        ctx.settings, ctx.direct = values[11:], direct
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:13]
        arguments = LinkArguments._make((*saved[:11], *ctx.settings))
        pre, z, stats = saved[11:] or (None, None, None)
        direct = ctx.direct and not observed() and is_ordinary(dy)
        grads = ops.link_bwd(arguments, dy.contiguous(), pre, z, stats, list(needs), direct)
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (None, None, *wanted, None, None, None, None)


class Handoff(torch.autograd.Function):
    """``apply(rows [n, d], embeds [R, d], slot_rows [n]) -> embeds'``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
        ctx.save_for_backward(slot_rows)
        ctx.row_dtype = rows.dtype
        return ops.handoff_fwd(rows, embeds, slot_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (slot_rows,) = ctx.saved_tensors
        drows, dembeds = ops.handoff_bwd(dy.contiguous(), slot_rows)
        return drows.to(ctx.row_dtype), dembeds, None


class Alignment(torch.autograd.Function):
    """``apply(pred, target, token_ids, mask, cosine_weight, mse_weight, embed_scale) -> loss``; pred alone learns."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, *rest: Any) -> Tensor:
        loss, grad = ops.alignment_fwd(pred, *rest)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # Where reading a value waits for nothing: a second tensor of this size is most of the time of the loss.
        if reads_at_once(dloss) and not torch.compiler.is_compiling() and dloss == 1:
            return grad, None, None, None, None, None, None
        return (grad * dloss).to(grad.dtype), None, None, None, None, None, None
