"""The public functions: shapes and dtypes around the ops, and which way a call takes.

Nothing here knows devices or kernels. Inputs of any leading shape and stride become two-dimensional with a contiguous
last dimension; nothing that was given is ever written to, unless ``inplace=True`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from recmas_kernels import autograd, checks, ops, reference, serve
from recmas_kernels.backends import packing
from recmas_kernels.backends.choice import expect_reference
from recmas_kernels.backends.tensors import is_plain_link
from recmas_kernels.config import ACTIVATIONS
from recmas_kernels.devices import autocast_enabled, compute_dtype, device_type
from recmas_kernels.observed import is_ordinary, observed, traced, transformed
from recmas_kernels.reference import LinkArguments

Norm = tuple[Tensor, Tensor | None]
"""A LayerNorm's parameters ``(weight, bias or None)``, each of the norm's width."""

_TRANSFORMS = "torch.func transforms and forward-mode AD"

forget_packed = packing.forget
_unsafe_view = torch.ops.aten._unsafe_view.default


def _flattened(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]``, a view where strides allow one."""
    dimensions = tensor.dim()
    if dimensions == 2 or dimensions == 0:  # a scalar is for the checks to refuse
        return tensor
    if transformed():  # a view of a dual number needs both parts in one layout
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.unsqueeze(0) if dimensions == 1 else tensor.flatten(0, -2)


def _rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]`` with a contiguous last dimension; the row stride is kept."""
    rows = _flattened(tensor)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """New ``rows [T, n]``, which nobody else holds, as ``[..., n]``; no view, which autograd lets nobody detach."""
    return _unsafe_view(rows, shape)


def _weight_and_bias(name: str, norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    if not isinstance(norm, tuple | list) or len(norm) != 2:
        raise TypeError(f"{name} is a {type(norm).__name__}, expected (weight, bias or None)")
    weight, bias = norm
    if weight is None:
        raise ValueError(f"{name} has no weight, expected (weight, bias or None)")
    return weight, bias


def _any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    for tensor in tensors:  # noqa: SIM110 (a generator costs 1 us more)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _direct(*tensors: Tensor | None) -> bool:
    """Whether a call on these may leave the dispatcher out."""
    return not observed() and all(tensor is None or is_ordinary(tensor) for tensor in tensors)


def _needs_plain_torch(arguments: LinkArguments) -> str | None:
    """What only plain torch can serve, since ops have no rule for it; None for calls that ops serve."""
    if transformed():
        return _TRANSFORMS
    if torch.onnx.is_in_onnx_export():
        return "an export to ONNX"
    for tensor in arguments.tensors:
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            return f"a {type(tensor).__name__}"
    return None


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

    ``torch.func`` transforms and forward-mode AD are served by plain torch on every device.

    Returns:
        ``[..., out_features]`` in x's dtype. Under autocast the arithmetic runs in autocast's dtype; weights of
        another dtype are cast inside, and weight gradients leave in the weight's own dtype, accumulated in float32.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        TypeError: an argument is not a floating-point tensor.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if not isinstance(x, Tensor) or x.is_nested:
        raise TypeError(f"x is a {'nested tensor' if isinstance(x, Tensor) else type(x).__name__}, expected a tensor")
    autocast = autocast_enabled(device_type(x))
    arguments = LinkArguments(
        _flattened(x),
        w1,
        b1,
        w2,
        b2,
        w3,
        b3,
        *_weight_and_bias("norm_in", norm_in),
        *_weight_and_bias("norm_out", norm_out),
        residual,
        ACTIVATIONS[activation],
        checks.checked_eps(eps),
        compute_dtype(x) if autocast else x.dtype,
    )
    direct = not (observed() or x.is_neg() or x._is_zerotensor()) and is_plain_link(arguments, autocast)
    plain = None if direct else _needs_plain_torch(arguments)
    records = torch.is_grad_enabled() or (not direct and torch.jit.is_tracing())  # a trace is checked without gradients
    if not direct:
        arguments = checks.checked_link(arguments, x.shape)
        arguments = arguments._replace(x=_rows(arguments.x))
    if plain is not None:
        expect_reference(plain)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            y = reference.link_fwd(arguments)
    elif not (records and _any_requires_grad(arguments[:11])):
        y = serve.link_fwd(arguments) if direct else ops.link_fwd(*arguments, False)
    elif direct:
        y = autograd.link(recompute, *arguments)
    else:
        y = ops.link_fwd(*arguments, True) if recompute else ops.link_fwd_train(*arguments)[0]
    return y if x.dim() == 2 else _shaped(y, (*x.shape[:-1], w2.shape[0]))


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
        ValueError: shapes do not fit, an index is not one-dimensional int64 or, where the host can see it, names no
            row, or ``inplace`` was asked for under grad.
        TypeError: an argument, or what the link returns, is not a floating-point tensor.
    """
    checks.expect_rows("hidden", hidden)
    checks.expect_rows("embeds", embeds)
    if not callable(link):
        raise TypeError(f"link is a {type(link).__name__}, expected a callable")
    checks.expect_row_index("slot_rows", slot_rows)
    checks.expect_device("slot_rows", slot_rows, "embeds", embeds.device)
    rows = _rows(hidden)
    if source_rows is not None:
        checks.expect_row_index("source_rows", source_rows)
        checks.expect_device("source_rows", source_rows, "hidden", hidden.device)
        try:
            rows = rows.index_select(0, source_rows)
        except IndexError:
            raise checks.outside("source_rows", source_rows, rows.shape[0]) from None
    if rows.shape[0] != slot_rows.shape[0]:
        raise ValueError(f"slot_rows names {slot_rows.shape[0]} rows for {rows.shape[0]} latents")
    mapped = link(rows)
    checks.expect_rows("what the link returns", mapped)
    if mapped.shape[-1] != embeds.shape[-1]:
        raise ValueError(f"the link returns {mapped.shape[-1]} features, embeds has {embeds.shape[-1]}")
    checks.expect_device("what the link returns", mapped, "embeds", embeds.device)
    mapped = _rows(mapped.to(embeds.dtype))
    if mapped.shape[0] != slot_rows.shape[0]:
        raise ValueError(f"the link returns {mapped.shape[0]} rows for {slot_rows.shape[0]} latents")
    if inplace:
        if (torch.is_grad_enabled() and (mapped.requires_grad or embeds.requires_grad)) or transformed():
            raise ValueError("inplace=True is only for inference: run under torch.no_grad(), outside of transforms")
        if not embeds.is_contiguous():
            raise ValueError("inplace=True needs contiguous embeds")
        if mapped.untyped_storage().data_ptr() == embeds.untyped_storage().data_ptr():
            mapped = mapped.clone()  # latents that are rows of embeds would be overwritten while they are read
        ops.handoff_(mapped, _rows(embeds), slot_rows)
        return embeds
    flat = _rows(embeds).contiguous()
    if transformed():
        expect_reference(_TRANSFORMS)
        return _shaped(reference.handoff_fwd(mapped, flat, slot_rows), embeds.shape)
    learns = torch.is_grad_enabled() and (mapped.requires_grad or flat.requires_grad)
    send = serve.handoff_fwd if not learns and _direct(mapped, flat, slot_rows) else ops.handoff_fwd
    try:
        return _shaped(send(mapped, flat, slot_rows), embeds.shape)
    except IndexError:
        raise checks.outside("slot_rows", slot_rows, flat.shape[0]) from None


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
        ValueError: shapes or devices do not fit, a weight is not finite, or, where the host can see it, the mask holds
            a negative weight or an id names no row of the table; the message names the argument.
        TypeError: pred or target is not floating-point, or token_ids are not int64.
    """
    checks.check_alignment(pred, target, token_ids, mask)
    if mask is not None and not traced() and is_ordinary(mask):
        checks.expect_weights("mask", mask)
    mask = None if mask is None else mask.reshape(-1).contiguous()
    ids = None if token_ids is None else token_ids.reshape(-1).contiguous()
    rows, table = _rows(pred), _rows(target.detach())
    named = {"cosine_weight": cosine_weight, "mse_weight": mse_weight, "embed_scale": embed_scale}
    weights = tuple(checks.checked_weight(name, value) for name, value in named.items())
    if transformed():
        expect_reference(_TRANSFORMS)
        return reference.alignment_loss(rows, table, ids, mask, *weights)
    if _direct(rows, table, ids, mask):
        try:
            return autograd.alignment(rows, table, ids, mask, *weights)
        except IndexError:
            if ids is None:
                raise
            raise checks.outside("token_ids", ids, table.shape[0], mask) from None
    return ops.alignment_fwd(rows, table, ids, mask, *weights)[0]
