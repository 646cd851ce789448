"""The derivatives of calls that leave the dispatcher out. The ops have the same ones; see ``derivatives.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recmas_kernels import serve
from recmas_kernels.derivatives import (
    alignment_gradients,
    frozen_linear_backward,
    frozen_linear_setup,
    keep_link,
    link_gradients,
)
from recmas_kernels.observed import function_without_transforms, is_ordinary, observed
from recmas_kernels.reference import LinkArguments


class Link(torch.autograd.Function):
    """``apply(recompute, *LinkArguments) -> y [T, out]``, for plain tensors that nothing observes."""

    @staticmethod
    def forward(ctx: Any, recompute: bool, *values: Any) -> Tensor:
        y, *intermediates = serve.link_fwd_train(LinkArguments._make(values))
        keep_link(ctx, values, () if recompute else intermediates)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *link_gradients(ctx, ctx.needs_input_grad[1:12], dy, direct=True), None, None, None, None)


class Alignment(torch.autograd.Function):
    """``apply(pred, target, token_ids, mask, cosine_weight, mse_weight, embed_scale) -> loss``, as `Link`."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        loss, ctx.grad = serve.alignment_fwd(*values)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values[:4])
        ctx.weights = values[4:]
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 7
        inputs, grad = ctx.saved_tensors, ctx.grad
        if grad is None:  # the graph was retained, and the gradient given away
            grad = serve.alignment_fwd(*inputs, *ctx.weights)[1]
        if torch.is_grad_enabled() or observed() or not is_ordinary(dloss):
            return alignment_gradients(inputs, ctx.weights, grad, dloss)
        ctx.grad = None
        return serve.alignment_bwd(grad, dloss), *(None,) * 6


class Frozen(torch.autograd.Function):
    """``apply(x, panels, bias, out_features, stored) -> y``, as `Link`."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        y = serve.frozen_linear(*values)
        frozen_linear_setup(ctx, values, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return frozen_linear_backward(ctx, dy)


link, alignment, frozen = map(function_without_transforms, (Link, Alignment, Frozen))
