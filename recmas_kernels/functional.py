"""The differentiable functions: checks, shapes and dtypes around the ops, and their ``autograd.Function``s.

Nothing here knows devices or kernels. Inputs of any leading shape and stride are brought to two dimensions with a
contiguous last one; incoming gradients are made contiguous; nothing that was given or saved is ever written to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recmas_kernels import backends, ops, reference
from recmas_kernels.backends import packing
from recmas_kernels.observed import is_ordinary, observed, transformed

Norm = tuple[Tensor, Tensor | None]
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}
RESIDUALS = ("identity", "linear", "none")
_PARAMETER_NAMES = (
    *("w1", "b1", "w2", "b2", "w3", "b3"),
    *("norm_in weight", "norm_in bias", "norm_out weight", "norm_out bias"),
)

_TRANSFORMS = "torch.func transforms and forward-mode AD"

forget_packed = packing.forget


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        w3: Tensor | None,
        b3: Tensor | None,
        gi: Tensor | None,
        ci: Tensor | None,
        go: Tensor | None,
        co: Tensor | None,
        settings: tuple[str, str, float, torch.dtype],  # residual, gelu, eps, compute dtype
        direct: bool,
        recompute: bool,
    ) -> Tensor:
        tensors = (x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)
        y, *intermediates = ops.caller(ops.link_fwd_train, direct)(*tensors, *settings)
        if recompute:
            intermediates.clear()
        ctx.save_for_backward(*tensors, *intermediates)
        ctx.settings, ctx.direct = settings, direct
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:11]
        (x, *parameters), intermediates = saved[:11], saved[11:] or (None, None, None)
        direct = ctx.direct and not observed() and is_ordinary(dy)
        grads = ops.caller(ops.link_bwd, direct)(
            dy.contiguous(), x, *intermediates, *parameters, *ctx.settings, list(needs)
        )
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*wanted, None, None, None)


class _Handoff(torch.autograd.Function):
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


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        token_ids: Tensor | None,
        mask: Tensor | None,
        cosine_weight: float,
        mse_weight: float,
        embed_scale: float,
    ) -> Tensor:
        loss, grad = ops.alignment_fwd(pred, target, token_ids, mask, cosine_weight, mse_weight, embed_scale)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # Where asking is free: a second tensor of this size is most of the time of the loss.
        if backends.reads_at_once(dloss) and not torch.compiler.is_compiling() and dloss == 1:
            return grad, None, None, None, None, None, None
        return (grad * dloss).to(grad.dtype), None, None, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]`` with a contiguous last dimension; the row stride stays whatever it is."""
    rows = tensor if tensor.dim() == 2 else tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _same_device(name: str, tensor: Tensor | None, owner: str, device: torch.device) -> None:
    """Kernels are chosen by the first tensor's device; an address of another one would be read as if it were there."""
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{owner} is on {device} and {name} is on {tensor.device}: move one of them")


def _checked_link(
    residual: str, norm_in: Norm | None, norm_out: Norm | None, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """x and the ten parameters with contiguous parameters; ValueError or TypeError for the first that does not fit."""
    for name, norm in (("norm_in", norm_in), ("norm_out", norm_out)):
        if norm is not None and norm[0] is None:
            raise ValueError(f"{name} has no weight, expected (weight, bias or None)")
    x, w1, _, w2, _, w3, b3 = tensors[:7]
    assert x is not None
    if w1 is None or w2 is None:
        raise TypeError("w1 and w2 must be tensors")
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}, expected a floating-point dtype")
    if w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(f"w1 and w2 must have two dimensions, have {w1.dim()} and {w2.dim()}")
    (hidden, in_features), out_features = w1.shape, w2.shape[0]
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {in_features}] to fit w1 {tuple(w1.shape)}")
    if residual not in RESIDUALS:
        raise ValueError(f"residual is {residual!r}, expected one of {', '.join(RESIDUALS)}")
    if (residual == "linear") != (w3 is not None):
        raise ValueError(
            f"w3 is {'missing' if w3 is None else 'given'} with residual={residual!r}; only 'linear' has one"
        )
    if w3 is None and b3 is not None:
        raise ValueError("b3 is given without w3")
    shapes = {"w1": w1.shape, "w2": (out_features, hidden), "w3": (out_features, in_features), "b1": (hidden,)}
    wide, narrow = (out_features,), (in_features,)
    for name, tensor in zip(_PARAMETER_NAMES, tensors[1:], strict=True):
        if tensor is None:
            continue
        shape = shapes.get(name) or (narrow if name.startswith("norm_in") else wide)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype is not dtype and (dtype is torch.float64 or not backends.autocast_enabled(device.type)):
            raise ValueError(
                f"x has dtype {dtype} and {name} has {tensor.dtype}: convert one of them, or run under torch.autocast"
            )
        if tensor.device != device:
            raise ValueError(f"x is on {device} and {name} is on {tensor.device}: move one of them")
    if residual == "identity" and in_features != out_features:
        raise ValueError(f"residual='identity' needs in_features == out_features, got {in_features} and {out_features}")
    return (x, *(t if t is None or t.is_contiguous() else t.contiguous() for t in tensors[1:]))


def _any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    for tensor in tensors:  # noqa: SIM110 (a generator costs 1 us more)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def recursive_link(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    w3: Tensor | None = None,
    b3: Tensor | None = None,
    residual: str = "identity",
    norm_in: Norm | None = None,
    norm_out: Norm | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """A RecursiveLink: ``norm_out(r + gelu(norm_in(x) w1^T + b1) w2^T + b2)`` (arXiv 2604.25917, equations 3 and 4).

    Args:
        x: ``[..., in_features]``, float32, bfloat16, float16 or float64, any strides, any number of rows including
            none.
        w1: ``[hidden_features, in_features]``.
        w2: ``[out_features, hidden_features]``.
        b1: ``[hidden_features]``, or None.
        b2: ``[out_features]``, or None.
        w3: ``[out_features, in_features]``, for ``residual="linear"`` only.
        b3: ``[out_features]``, or None.
        residual: r = x ("identity"), x w3^T + b3 ("linear") or 0 ("none"); always of the raw x.
        norm_in: LayerNorm ``(weight, bias)`` of ``in_features`` before w1, or None.
        norm_out: LayerNorm ``(weight, bias)`` of ``out_features`` over the sum, or None.
        eps: LayerNorm epsilon.
        activation: "gelu" (exact erf) or "gelu_tanh".
        recompute: keep nothing but x for the backward pass, which then runs the forward kernel once more. Otherwise
            the pre-activation and, with an output norm, the sum before it are kept: ``hidden_features +
            out_features`` numbers per token in the compute dtype, and 16 bytes. The gradients are the same bits.

    ``torch.func`` transforms and forward-mode AD are served by plain torch, whatever the device.

    Returns:
        ``[..., out_features]`` in x's dtype. Under autocast the arithmetic runs in autocast's dtype; weights of
        another dtype are cast inside, and weight gradients leave in the weight's own dtype, accumulated in float32.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        TypeError: an argument is not a floating-point tensor.
    """
    if activation not in _GELU:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(_GELU)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    gi, ci = norm_in if norm_in is not None else (None, None)
    go, co = norm_out if norm_out is not None else (None, None)
    tensors: tuple[Tensor | None, ...] = (x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)
    autocast = backends.autocast_enabled(x.device.type)
    dtype = backends.compute_dtype(x) if autocast else x.dtype
    direct = not (observed() or x.is_neg() or x._is_zerotensor()) and backends.is_plain_link(
        residual, autocast, *tensors
    )
    if not direct:
        tensors = _checked_link(residual, norm_in, norm_out, tensors)
    rows = x if direct and x.dim() == 2 else _rows(x)
    settings = (residual, _GELU[activation], eps, dtype)
    if not direct and transformed():
        backends.expect_reference(_TRANSFORMS)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            y = reference.link_fwd(rows, *tensors[1:], *settings, False)  # type: ignore[arg-type, call-arg]
    elif torch.is_grad_enabled() and _any_requires_grad(tensors):
        y = _Link.apply(rows, *tensors[1:], settings, direct, recompute)
    else:
        y = ops.caller(ops.link_fwd, direct)(rows, *tensors[1:], *settings, True)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w2.shape[0])


def _check_row_index(name: str, index: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}, expected one-dimensional int64 row numbers"
        )


def latent_handoff(
    hidden: Tensor,
    link: Callable[[Tensor], Tensor],
    embeds: Tensor,
    *,
    slot_rows: Tensor,
    source_rows: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Send latents through an outer link into a receiver's input embeddings.

    ``embeds'[slot_rows[i]] = link(hidden[source_rows[i]])``, every other row as it was, rows counted over the
    flattened leading dimensions of ``hidden`` and ``embeds``. The latents are already through the sender's inner
    link: a handoff is R_out(R_in(H)). Latents are never rescaled here.

    Args:
        hidden: ``[..., d_source]``, R_in'd latents.
        link: the outer link, ``[n, d_source] -> [n, d]``.
        embeds: ``[..., d]``, the receiver's input embeddings.
        slot_rows: int64 ``[n]``, unique rows of ``embeds`` (uniqueness is checked under ``RECMAS_CHECK=1``).
        source_rows: int64 ``[n]``, rows of ``hidden``; None takes all of them in order.
        inplace: write into ``embeds`` itself; only without grad.

    Returns:
        Embeddings shaped and typed as ``embeds``: a new tensor, or ``embeds`` if ``inplace``.

    Raises:
        ValueError: shapes do not fit, an index is not one-dimensional int64, or ``inplace`` was asked for under grad.
    """
    _check_row_index("slot_rows", slot_rows)
    _same_device("slot_rows", slot_rows, "embeds", embeds.device)
    rows = _rows(hidden)
    if source_rows is not None:
        _check_row_index("source_rows", source_rows)
        _same_device("source_rows", source_rows, "hidden", hidden.device)
        rows = rows.index_select(0, source_rows)
    if rows.shape[0] != slot_rows.shape[0]:
        raise ValueError(f"slot_rows names {slot_rows.shape[0]} rows for {rows.shape[0]} latents")
    mapped = link(rows)
    if mapped.shape[-1] != embeds.shape[-1]:
        raise ValueError(f"the link writes {mapped.shape[-1]} features, embeds has {embeds.shape[-1]}")
    _same_device("what the link writes", mapped, "embeds", embeds.device)
    mapped = _rows(mapped.to(embeds.dtype))
    differentiable = torch.is_grad_enabled() and (mapped.requires_grad or embeds.requires_grad)
    if inplace:
        if differentiable or transformed():
            raise ValueError("inplace=True is only for inference: run under torch.no_grad(), outside of transforms")
        if not embeds.is_contiguous():
            raise ValueError("inplace=True needs contiguous embeds")
        if mapped.untyped_storage().data_ptr() == embeds.untyped_storage().data_ptr():
            mapped = mapped.clone()  # latents that are rows of embeds would be overwritten while they are read
        ops.handoff_(mapped, _rows(embeds), slot_rows)
        return embeds
    flat = _rows(embeds).contiguous()
    if transformed():
        backends.expect_reference(_TRANSFORMS)
        return reference.handoff_fwd(mapped, flat, slot_rows).view(embeds.shape)
    out = _Handoff.apply(mapped, flat, slot_rows) if differentiable else ops.handoff_fwd(mapped, flat, slot_rows)
    return out.view(embeds.shape)


def alignment_loss(
    pred: Tensor,
    target: Tensor,
    *,
    token_ids: Tensor | None = None,
    mask: Tensor | None = None,
    cosine_weight: float = 1.0,
    mse_weight: float = 0.0,
    embed_scale: float = 1.0,
) -> Tensor:
    """Masked mean of ``cosine_weight (1 - cos(pred, e)) + mse_weight mean((pred - e)^2)``: the inner and warm-up loss.

    Args:
        pred: ``[..., d]``, link outputs; the only argument that receives a gradient.
        target: ``[..., d]`` rows like ``pred``; or the embedding table ``[vocabulary, d]`` when ``token_ids`` is given.
        token_ids: int64 ``[...]``, one id per row of ``pred``; its table row is gathered inside the kernel.
        mask: ``[...]``, bool or a non-negative weight per row; None takes every row. Masked rows may hold anything.
        cosine_weight: weight of the cosine term.
        mse_weight: weight of the mean squared error.
        embed_scale: factor on target rows, for models that scale their embeddings.

    Returns:
        Scalar, float32 (float64 for float64 inputs). An empty mask gives 0 with zero gradient.

    Raises:
        ValueError: shapes or dtypes do not fit; the message names the argument.
    """
    if not pred.is_floating_point():
        raise TypeError(f"pred has dtype {pred.dtype}, expected a floating-point dtype")
    leading, width = pred.shape[:-1], pred.shape[-1]
    if token_ids is None:
        _expect("target", target, *pred.shape)
    else:
        if token_ids.dtype != torch.int64:
            raise TypeError(f"token_ids has dtype {token_ids.dtype}, expected torch.int64")
        _expect("token_ids", token_ids, *leading)
        if target.dim() != 2 or target.shape[1] != width:
            raise ValueError(
                f"target has shape {tuple(target.shape)}, expected an embedding table [vocabulary, {width}]"
            )
    for name, tensor in (("target", target), ("token_ids", token_ids), ("mask", mask)):
        _same_device(name, tensor, "pred", pred.device)
    if mask is not None:
        _expect("mask", mask, *leading)
        mask = mask.reshape(-1).contiguous()
    ids = None if token_ids is None else token_ids.reshape(-1).contiguous()
    rows, table = _rows(pred), _rows(target.detach())
    weights = float(cosine_weight), float(mse_weight), float(embed_scale)
    if transformed():
        backends.expect_reference(_TRANSFORMS)
        if mask is not None:  # what a row outside of it holds must not reach a derivative
            rows = torch.where(mask[:, None] != 0, rows, 0)
        return reference.alignment_fwd(rows, table, ids, mask, *weights)[0]
    return _Alignment.apply(rows, table, ids, mask, *weights)
