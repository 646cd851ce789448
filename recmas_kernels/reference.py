"""The mathematics of every op in plain torch: the oracle, the fallback and the documentation.

With the tensors of `LinkArguments` and T tokens, a link computes

    u = norm_in(x)                LayerNorm, or x itself
    p = u W1^T + b1               the pre-activation
    a = gelu(p)                   exact erf ("none") or "tanh"
    r = x | x W3^T + b3 | 0       residual: "identity" | "linear" | "none"; always reads the raw x
    z = r + a W2^T + b2
    y = norm_out(z)               LayerNorm, or z itself

which is equation (3) (inner link) and (4) (outer link) of arXiv 2604.25917 with the LayerNorms of the released modules.
Matmuls run in the compute dtype; statistics, reductions and the loss run in float32 (float64 for float64). Every
backend offers functions of these names and signatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COSINE_EPS = 1e-8  # the clamp of torch.nn.functional.cosine_similarity


class LinkArguments(NamedTuple):
    """The eleven tensors and the settings of one call of a link. Weights are stored as ``nn.Linear`` stores them.

    ``csrc/python/link_arguments.h`` reads it by position.
    """

    x: Tensor  # [T, in_features]
    w1: Tensor  # [hidden_features, in_features]
    b1: Tensor | None  # [hidden_features]
    w2: Tensor  # [out_features, hidden_features]
    b2: Tensor | None  # [out_features]
    w3: Tensor | None  # [out_features, in_features], for residual "linear" only
    b3: Tensor | None  # [out_features]
    norm_in_weight: Tensor | None  # [in_features]; None: no input norm
    norm_in_bias: Tensor | None  # [in_features]
    norm_out_weight: Tensor | None  # [out_features]; None: no output norm
    norm_out_bias: Tensor | None  # [out_features]
    residual: str  # "identity", "linear" or "none"
    gelu: str  # "none" (exact erf) or "tanh", torch's names of the approximation
    eps: float  # of both norms
    dtype: torch.dtype  # that of the arithmetic; x and the parameters may have others

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """x and the ten parameters."""
        return self[:11]

    @property
    def named_tensors(self) -> dict[str, Tensor | None]:
        """`tensors` by name."""
        return dict(zip(self._fields, self.tensors, strict=False))

    @property
    def settings(self) -> tuple[str, str, float, torch.dtype]:
        """residual, gelu, eps and dtype."""
        return self[11:]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over ``dtype`` values are formed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _whole_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x ``[T, n]`` in ``dtype`` and contiguous: in AMX registers, torch's bf16 product reads on after the end of a row
    and multiplies what it finds there by 0, which is NaN where memory between rows holds NaN or infinity."""
    return x.to(dtype).contiguous()


def _layer_norm(
    rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension with statistics in the accumulator dtype.

    Returns ``(normalised [T, n] in dtype, mean [T], rstd [T])``.
    """
    acc = accumulator(dtype)
    out, mean, rstd = torch.native_layer_norm(rows.to(acc), [rows.shape[-1]], weight.to(acc), _cast(bias, acc), eps)
    return out.to(dtype), mean.flatten(), rstd.flatten()


def _layer_norm_backward(
    dout: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(drows, dweight, dbias or None)`` in the accumulator dtype, which is that of ``dout``."""
    acc = dout.dtype
    return torch.ops.aten.native_layer_norm_backward(
        dout,
        rows.to(acc),
        [rows.shape[-1]],
        mean.to(acc)[:, None],
        rstd.to(acc)[:, None],
        weight.to(acc),
        _cast(bias, acc),
        [True, True, bias is not None],
    )


def _outer_product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``left^T right`` accumulated and returned in at least float32, then cast to ``out_dtype`` once.

    A bf16 product cast to a float32 master would round every weight gradient to 8 bits first.
    """
    if left.dtype == out_dtype:
        return left.t() @ right
    if left.is_cuda and out_dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=out_dtype)
    acc = accumulator(out_dtype)
    return (left.to(acc).t() @ right.to(acc)).to(out_dtype)


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y [T, out] in x's dtype, pre [T, hidden], z [T, out] or [0], stats [4, T])``.

    pre and z have the compute dtype; z is kept only for an output norm. stats holds mean_in, rstd_in, mean_out and
    rstd_out in float32 (float64 for float64), zero where a norm is absent.
    """
    x, w1, b1, w2, b2, w3, b3, gain_in, bias_in, gain_out, bias_out, residual, gelu, eps, dtype = arguments
    raw = _whole_rows(x, dtype)
    absent = torch.zeros(x.shape[0], dtype=accumulator(dtype), device=x.device)
    u, mean_in, rstd_in, mean_out, rstd_out = raw, absent, absent, absent, absent
    if gain_in is not None:
        u, mean_in, rstd_in = _layer_norm(raw, gain_in, bias_in, eps, dtype)
    pre = F.linear(u, w1.to(dtype), _cast(b1, dtype))
    z = F.linear(F.gelu(pre, approximate=gelu), w2.to(dtype), _cast(b2, dtype))
    if residual == "identity":
        z = z + raw
    elif residual == "linear":
        assert w3 is not None
        z = z + F.linear(raw, w3.to(dtype), _cast(b3, dtype))
    y, kept = z, z.new_empty(0)
    if gain_out is not None:
        kept = z
        y, mean_out, rstd_out = _layer_norm(z, gain_out, bias_out, eps, dtype)
    return y.to(x.dtype), pre, kept, torch.stack((mean_in, rstd_in, mean_out, rstd_out))


def link_fwd(arguments: LinkArguments) -> Tensor:
    """``y [T, out]`` in x's dtype."""
    return link_fwd_train(arguments)[0]


def link_bwd(
    arguments: LinkArguments, dy: Tensor, pre: Tensor, z: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of ``arguments.tensors``, in that order and in their dtypes; ``[0]`` where ``needs`` is False.

    With dz = dy through the output norm: da = dz W2, dp = da * gelu'(p), du = dp W1 and dx = du through the input norm
    plus dz through the residual. ``pre``, ``z`` and ``stats`` are what `link_fwd_train` returned.
    """
    x, w1, _, w2, _, w3, _, gain_in, bias_in, gain_out, bias_out, residual, gelu, eps, dtype = arguments
    need_x, need_w1, need_b1, need_w2, need_b2, need_w3, need_b3, need_gain_in, need_bias_in, _, _ = needs
    acc = accumulator(dtype)
    dx = dw1 = db1 = dw2 = db2 = dw3 = db3 = dgain_in = dbias_in = dgain_out = dbias_out = None

    raw, dz_acc = _whole_rows(x, dtype), dy.to(acc)
    if gain_out is not None:
        dz_acc, dgain_out, dbias_out = _layer_norm_backward(dz_acc, z, stats[2], stats[3], gain_out, bias_out)
    dz = dz_acc.to(dtype)
    if need_b2:
        db2 = dz_acc.sum(0)
    if need_b3:
        db3 = dz_acc.sum(0)
    if need_w3 and w3 is not None:
        dw3 = _outer_product(dz, raw, w3.dtype)
    if need_w2:
        dw2 = _outer_product(dz, F.gelu(pre, approximate=gelu), w2.dtype)
    if need_x or need_w1 or need_b1 or need_gain_in or need_bias_in:
        da = (dz @ w2.to(dtype)).to(acc)
        dp_acc = torch.ops.aten.gelu_backward(da, pre.to(acc), approximate=gelu)
        dp = dp_acc.to(dtype)
        if need_b1:
            db1 = dp_acc.sum(0)
        if need_w1:
            u = raw if gain_in is None else _layer_norm(raw, gain_in, bias_in, eps, dtype)[0]
            dw1 = _outer_product(dp, u, w1.dtype)
        if need_x or need_gain_in or need_bias_in:
            du = (dp @ w1.to(dtype)).to(acc)
            if gain_in is not None:
                du, dgain_in, dbias_in = _layer_norm_backward(du, raw, stats[0], stats[1], gain_in, bias_in)
            if residual == "identity":
                du = du + dz_acc
            elif residual == "linear":
                assert w3 is not None
                du = du + (dz @ w3.to(dtype)).to(acc)
            dx = du
    grads = (dx, dw1, db1, dw2, db2, dw3, db3, dgain_in, dbias_in, dgain_out, dbias_out)
    return tuple(
        grad.to(tensor.dtype) if need and grad is not None and tensor is not None else x.new_empty(0)
        for grad, tensor, need in zip(grads, arguments.tensors, needs, strict=True)
    )


def handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    """A copy of ``embeds [R, d]`` in which row ``slot_rows[i]`` is ``rows[i]``. slot_rows is int64 [n], unique."""
    return embeds.index_copy(0, slot_rows, rows.to(embeds.dtype))


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``handoff_fwd`` into ``embeds`` itself."""
    embeds.index_copy_(0, slot_rows, rows.to(embeds.dtype))


def handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(drows [n, d], dembeds [R, d])``: the slots' gradients, and the rest with the slots zeroed."""
    return dy.index_select(0, slot_rows), dy.index_fill(0, slot_rows, 0)


def alignment_fwd(
    pred: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    """The alignment loss and its gradient with respect to ``pred [T, d]``, in one pass.

    With e the target row (``target[token_ids]`` when ids are given) times ``embed_scale``,

        loss = sum_t mask_t (cosine_weight (1 - cos(pred_t, e_t)) + mse_weight mean_d (pred_t - e_t)^2) / sum_t mask_t

    Returns ``(loss, scalar in float32 or float64; grad [T, d] in pred's dtype)``; both are 0 for an empty mask.
    """
    acc = accumulator(pred.dtype)
    if token_ids is not None and mask is not None:
        token_ids = torch.where(mask != 0, token_ids, 0)  # such as an ignore index of -100
    rows = target if token_ids is None else target.index_select(0, token_ids)
    p, e = pred.to(acc), rows.to(acc) * embed_scale
    weight = torch.ones(p.shape[0], dtype=acc, device=p.device) if mask is None else mask.to(acc)
    total = weight.sum()
    share = torch.where(total > 0, weight / total.where(total > 0, 1), 0)

    features = max(1, p.shape[-1])  # the mean over no features is 0
    norm_p, norm_e = p.norm(dim=-1), e.norm(dim=-1).clamp_min(COSINE_EPS)
    inverse = 1 / norm_p.clamp_min(COSINE_EPS)
    cosine = (p * e).sum(-1) * inverse / norm_e
    # Below the clamp the denominator is a constant, so the radial part of the gradient vanishes.
    radial = torch.where(norm_p > COSINE_EPS, cosine * inverse * inverse, 0)
    difference = p - e
    chosen = share > 0  # rows that are masked out may hold anything, NaN included
    row_loss = cosine_weight * (1 - cosine) + mse_weight * difference.square().sum(-1) / features
    loss = torch.where(chosen, share * row_loss, 0).sum()
    dcosine = e * (inverse / norm_e)[:, None] - p * radial[:, None]
    row_grad = difference * (2 * mse_weight / features) - cosine_weight * dcosine
    grad = torch.where(chosen[:, None], share[:, None] * row_grad, 0)
    return loss, grad.to(pred.dtype)


def alignment_bwd(grad: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of ``pred [T, d]`` from what `alignment_fwd` returned and the scalar gradient of the loss."""
    return (grad * dloss).to(grad.dtype)


def alignment_loss(
    pred: Tensor, target: Tensor, token_ids: Tensor | None, mask: Tensor | None, *weights: float
) -> Tensor:
    """The loss of `alignment_fwd`, to be differentiated by torch as often as it likes."""
    if mask is not None:  # a masked row's values must not reach a derivative
        pred = torch.where(mask[:, None] != 0, pred, 0)
    return alignment_fwd(pred, target, token_ids, mask, *weights)[0]
