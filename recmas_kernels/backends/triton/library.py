"""The products of a link by torch's own library, with one pointwise pass after each: always right, never far off.

The residual's product W3 x may join the second one as further columns of its operands, [a | x] [W2 | W3]^T: one
product instead of two, for one copy of x (a store in the norm's pass) and one of the weights (`plan.joins`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recmas_kernels.backends.triton import activation, plan


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor`` in ``dtype``; None stays None."""
    return None if tensor is None else tensor.to(dtype)


def joint(x: Tensor, hidden_features: int, w3: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The buffer that `up` and the norm's pass fill and `down` reads: ``[T, hidden]``, or ``[T, hidden + in]``."""
    tokens, in_features = x.shape
    joins = w3 is not None and plan.joins(tokens, in_features, hidden_features, w3.shape[0])
    return torch.empty(tokens, hidden_features + (in_features if joins else 0), dtype=dtype, device=x.device)


def up(u: Tensor, w1: Tensor, b1: Tensor | None, gelu: str, act: Tensor, *, keep: bool) -> Tensor | None:
    """``act = gelu(pre)``, ``pre = u w1^T + b1 [T, hidden]``; returns pre if it is to be kept."""
    pre = F.linear(u, w1.to(u.dtype), cast(b1, u.dtype))
    activation.activate(pre, act, gelu)
    return pre if keep else None


def down(
    operand: Tensor,
    x: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
) -> Tensor:
    """``a w2^T + b2 (+ x w3^T + b3) [T, out]`` from the `joint` operand."""
    dtype = operand.dtype
    if w3 is None:
        return F.linear(operand, w2.to(dtype), cast(b2, dtype))
    out_features, hidden_features = w2.shape
    bias = b2 if b3 is None else b3 if b2 is None else b2.float() + b3.float()
    if operand.shape[1] == hidden_features:
        return F.linear(operand, w2.to(dtype), cast(bias, dtype)).addmm_(x.to(dtype), w3.to(dtype).t())
    weight = torch.empty(out_features, operand.shape[1], dtype=dtype, device=operand.device)
    weight[:, :hidden_features].copy_(w2)
    weight[:, hidden_features:].copy_(w3)
    return F.linear(operand, weight, cast(bias, dtype))


def weight_gradient(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``left^T right`` summed over tokens in float32 and rounded once, to ``out_dtype``."""
    if left.dtype == out_dtype:
        return left.t() @ right
    if left.is_cuda and torch.version.hip is None and out_dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=out_dtype)
    return (left.float().t() @ right.float()).to(out_dtype)


def weight_gradients(problems: list[tuple[Tensor, Tensor, torch.dtype]]) -> list[Tensor]:
    """`weight_gradient` of each ``(left, right, dtype of the result)``."""
    return [weight_gradient(*problem) for problem in problems]
