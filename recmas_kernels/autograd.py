"""`Link`: the derivative of a link that leaves the dispatcher out. The ops have the same; see ``derivatives.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recmas_kernels import serve
from recmas_kernels.derivatives import keep_link, link_gradients
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
