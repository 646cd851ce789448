"""The products of a link with their pointwise work in the epilogue, for many tokens and a large hidden width.

The activation, the second operand pair of an outer link ([a | x] [W2 | W3]^T without a joint buffer), the residual and
GELU's derivative never make a pass of their own. Two kernels form them, `product` and `persistent`: `tiles` says which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.candidates import persistent, product, tiles
from benchmarks.gpu.candidates.epilogue import PLAIN, SLOPE, UP
from benchmarks.gpu.candidates.product import Product


def _run(work: Product) -> Tensor | None:
    """Fill ``work.out`` and what else the epilogue writes; returns the float32 column sums if they are wanted."""
    rows, columns = work.out.shape
    device, dtype = work.out.device, work.left.dtype
    described = persistent.refusal(work) is None
    wide = work.mode != SLOPE.value
    config = tiles.choose([(rows, columns)], dtype, device, wide=wide, described=described)
    return (persistent if config.persistent else product).launch(work, config)


def up(u: Tensor, w1: Tensor, b1: Tensor | None, gelu: str, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``(gelu(pre), pre)`` with ``pre = u w1^T + b1 [T, hidden]``; pre is None unless it is kept."""
    act = torch.empty(u.shape[0], w1.shape[0], dtype=u.dtype, device=u.device)
    pre = torch.empty_like(act) if keep else None
    _run(Product(UP.value, u, w1.to(u.dtype).t(), act, bias=b1, pre=pre, tanh=gelu == "tanh"))
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
    work = Product(PLAIN.value, act, w2.to(act.dtype).t(), z, bias=b2, more_bias=b3)
    if w3 is not None:
        work = work._replace(more_left=raw, more_right=w3.to(act.dtype).t())
    _run(work._replace(addend=raw if residual == "identity" else None))
    return z


def hidden_gradient(
    dz: Tensor, w2: Tensor, pre: Tensor, act: Tensor | None, gelu: str, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``(dpre, its float32 column sums if asked for)``, ``dpre = (dz w2) * gelu'(pre)``; fills ``act`` if given."""
    dpre = torch.empty_like(pre)
    work = Product(SLOPE.value, dz, w2.to(dz.dtype), dpre, pre=pre, act=act, tanh=gelu == "tanh", sums=sums)
    return dpre, _run(work)


def input_gradient(
    dpre: Tensor, w1: Tensor, *, more: tuple[Tensor, Tensor] | None = None, addend: Tensor | None = None
) -> Tensor:
    """``dpre w1 (+ dz w3 as more) (+ dz as addend) [T, in]``."""
    du = torch.empty(dpre.shape[0], w1.shape[1], dtype=dpre.dtype, device=dpre.device)
    work = Product(PLAIN.value, dpre, w1.to(dpre.dtype), du, addend=addend)
    if more is not None:
        work = work._replace(more_left=more[0], more_right=more[1].to(dpre.dtype))
    _run(work)
    return du
