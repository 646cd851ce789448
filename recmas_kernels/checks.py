"""Checks of the public functions' arguments: ValueError or TypeError, naming the argument, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels.config import RESIDUALS
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.reference import LinkArguments

_PARAMETER_NAMES = (
    *("w1", "b1", "w2", "b2", "w3", "b3"),
    *("norm_in weight", "norm_in bias", "norm_out weight", "norm_out bias"),
)


def checked_link(arguments: LinkArguments, shape: torch.Size) -> LinkArguments:
    """``arguments`` with parameters made contiguous; an error for the first that does not fit.

    ``shape`` is x's own, before its rows were flattened.
    """
    x, w1, w2, w3 = arguments.x, arguments.w1, arguments.w2, arguments.w3
    if w1 is None or w2 is None:
        raise TypeError("w1 and w2 must be tensors")
    dtype, device, residual = x.dtype, x.device, arguments.residual
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}, expected a floating-point dtype")
    if w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(f"w1 and w2 must have two dimensions, have {w1.dim()} and {w2.dim()}")
    (hidden, in_features), out_features = w1.shape, w2.shape[0]
    if shape[-1:] != (in_features,):
        raise ValueError(f"x has shape {tuple(shape)}, expected [..., {in_features}] to fit w1 {tuple(w1.shape)}")
    if residual not in RESIDUALS:
        raise ValueError(f"residual is {residual!r}, expected one of {', '.join(RESIDUALS)}")
    if (residual == "linear") != (w3 is not None):
        raise ValueError(
            f"w3 is {'missing' if w3 is None else 'given'} with residual={residual!r}; only 'linear' has one"
        )
    if w3 is None and arguments.b3 is not None:
        raise ValueError("b3 is given without w3")
    shapes = {"w1": w1.shape, "w2": (out_features, hidden), "w3": (out_features, in_features), "b1": (hidden,)}
    wide, narrow = (out_features,), (in_features,)

    def may_differ(name: str, other: torch.dtype) -> bool:
        # torch's LayerNorm takes float32 parameters for rows of 16 bits.
        as_in_torch = name.startswith("norm") and other is torch.float32 and dtype in (torch.bfloat16, torch.float16)
        return as_in_torch or (dtype is not torch.float64 and autocast_enabled(device.type))

    for name, tensor in zip(_PARAMETER_NAMES, arguments.tensors[1:], strict=True):
        if tensor is None:
            continue
        expect_shape(name, tensor, *(shapes.get(name) or (narrow if name.startswith("norm_in") else wide)))
        if tensor.dtype is not dtype and not may_differ(name, tensor.dtype):
            raise ValueError(
                f"x has dtype {dtype} and {name} has {tensor.dtype}: convert one of them, or run under torch.autocast"
            )
        expect_device(name, tensor, "x", device)
    if residual == "identity" and in_features != out_features:
        raise ValueError(f"residual='identity' needs in_features == out_features, got {in_features} and {out_features}")
    parameters = (t if t is None or t.is_contiguous() else t.contiguous() for t in arguments.tensors[1:])
    return LinkArguments._make((x, *parameters, *arguments.settings))


def expect_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless ``tensor`` is absent or has this shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def expect_device(name: str, tensor: Tensor | None, owner: str, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is absent or on ``owner``'s device.

    Kernels are chosen by the first tensor's device; an address of another one would be read as if it were there.
    """
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{owner} is on {device} and {name} is on {tensor.device}: move one of them")


def expect_row_index(name: str, index: Tensor) -> None:
    """Raise ValueError unless ``index`` is one-dimensional int64."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}, expected one-dimensional int64 row numbers"
        )


def check_alignment(pred: Tensor, target: Tensor, token_ids: Tensor | None, mask: Tensor | None) -> None:
    """Raise unless the tensors of `alignment_loss` fit each other."""
    if not pred.is_floating_point():
        raise TypeError(f"pred has dtype {pred.dtype}, expected a floating-point dtype")
    leading, width = pred.shape[:-1], pred.shape[-1]
    if token_ids is None:
        expect_shape("target", target, *pred.shape)
    else:
        if token_ids.dtype != torch.int64:
            raise TypeError(f"token_ids has dtype {token_ids.dtype}, expected torch.int64")
        expect_shape("token_ids", token_ids, *leading)
        if target.dim() != 2 or target.shape[1] != width:
            raise ValueError(
                f"target has shape {tuple(target.shape)}, expected an embedding table [vocabulary, {width}]"
            )
    for name, tensor in (("target", target), ("token_ids", token_ids), ("mask", mask)):
        expect_device(name, tensor, "pred", pred.device)
    expect_shape("mask", mask, *leading)
