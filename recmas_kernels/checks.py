"""Checks of the arguments of the public functions and of the ops: ValueError or TypeError, naming the argument.

The ops check as well, since they are public, too: no backend sees tensors whose sizes, types or devices do not fit.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recmas_kernels.config import ACTIVATIONS, RESIDUALS
from recmas_kernels.devices import autocast_enabled, reads_at_once
from recmas_kernels.reference import LinkArguments, accumulator

_PARAMETER_NAMES = (
    *("w1", "b1", "w2", "b2", "w3", "b3"),
    *("norm_in weight", "norm_in bias", "norm_out weight", "norm_out bias"),
)


def checked_link(arguments: LinkArguments, shape: torch.Size, mixed: bool = False) -> LinkArguments:
    """``arguments`` with parameters made contiguous; an error for the first that does not fit.

    ``shape`` is x's own, before its rows were flattened. ``mixed`` allows parameters of other floating-point types than
    x's, as autocast does.
    """
    x, w1, w2, w3 = arguments.x, arguments.w1, arguments.w2, arguments.w3
    for name, value in (("x", x), ("w1", w1), ("w2", w2)):
        expect_tensor(name, value)
    dtype, device, residual = x.dtype, x.device, arguments.residual
    expect_floating("x", x)
    mixed = mixed or (dtype is not torch.float64 and autocast_enabled(device.type))
    if w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(f"w1 and w2 must have two dimensions, have {w1.dim()} and {w2.dim()}")
    (hidden, in_features), out_features = w1.shape, w2.shape[0]
    if shape[-1:] != (in_features,):
        raise ValueError(f"x has shape {tuple(shape)}, expected [..., {in_features}] to fit w1 {tuple(w1.shape)}")
    if not isinstance(residual, str) or residual not in RESIDUALS:
        raise ValueError(f"residual is {residual!r}, expected one of {', '.join(RESIDUALS)}")
    if (residual == "linear") != (w3 is not None):
        raise ValueError(
            f"w3 is {'missing' if w3 is None else 'given'} with residual={residual!r}; only 'linear' has one"
        )
    if w3 is None and arguments.b3 is not None:
        raise ValueError("b3 is given without w3")
    shapes = {"w1": w1.shape, "w2": (out_features, hidden), "w3": (out_features, in_features), "b1": (hidden,)}
    wide, narrow = (out_features,), (in_features,)

    def as_in_torch(name: str, other: torch.dtype) -> bool:
        """torch's LayerNorm takes float32 parameters for rows of 16 bits."""
        return name.startswith("norm") and other is torch.float32 and dtype in (torch.bfloat16, torch.float16)

    for name, tensor in zip(_PARAMETER_NAMES, arguments.tensors[1:], strict=True):
        if tensor is None:
            continue
        expect_tensor(name, tensor)
        expect_shape(name, tensor, *(shapes.get(name) or (narrow if name.startswith("norm_in") else wide)))
        if mixed:
            expect_floating(name, tensor)
        elif tensor.dtype is not dtype and not as_in_torch(name, tensor.dtype):
            raise ValueError(
                f"x has dtype {dtype} and {name} has {tensor.dtype}: convert one of them, or run under torch.autocast"
            )
        expect_device(name, tensor, "x", device)
    if residual == "identity" and in_features != out_features:
        raise ValueError(f"residual='identity' needs in_features == out_features, got {in_features} and {out_features}")
    parameters = (t if t is None or t.is_contiguous() else t.contiguous() for t in arguments.tensors[1:])
    return LinkArguments._make((x, *parameters, *arguments.settings))


@lru_cache(maxsize=256, typed=True)  # errors are not remembered
def check_link_settings(gelu: str, eps: float, dtype: torch.dtype) -> None:
    """Raise unless an op of a link can compute with these settings."""
    if gelu not in ACTIVATIONS.values():
        raise ValueError(f"gelu is {gelu!r}, expected one of {', '.join(ACTIVATIONS.values())}")
    checked_eps(eps)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected a floating-point dtype")


def check_saved(
    arguments: LinkArguments, dy: Tensor, pre: Tensor | None, z: Tensor | None, stats: Tensor | None
) -> None:
    """Raise unless a link's backward op can read ``dy`` and what its forward op kept, which may be absent together."""
    tokens, hidden_features, out_features = arguments.x.shape[0], arguments.w1.shape[0], arguments.w2.shape[0]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("dy", dy, (tokens, out_features))]
    if pre is not None:
        if stats is None:
            raise ValueError("stats is missing: the backward op takes pre, z and stats, or none of them")
        if stats.dtype is not accumulator(arguments.dtype):
            raise TypeError(f"stats has dtype {stats.dtype}, expected {accumulator(arguments.dtype)}")
        expected += [("pre", pre, (tokens, hidden_features)), ("stats", stats, (4, tokens))]
        if arguments.norm_out_weight is not None:
            if z is None:
                raise ValueError("z is missing: with an output norm the backward op reads the sum before it")
            expected.append(("z", z, (tokens, out_features)))
    for name, tensor, shape in expected:
        assert tensor is not None
        expect_floating(name, tensor)
        expect_shape(name, tensor, *shape)
        expect_device(name, tensor, "x", arguments.x.device)


def checked_eps(eps: float) -> float:
    """``eps`` as a float; an error unless it is a finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps is {eps!r}, expected a number >= 0")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is {eps!r}, expected a finite number >= 0")
    return float(eps)


def checked_weight(name: str, value: float) -> float:
    """``value`` as a float; an error unless it is a finite number."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number")
    return number


def expect_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, expected a dense tensor")


def expect_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` has a floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")


def expect_rows(name: str, value: Any) -> None:
    """Raise unless ``value`` is a floating-point tensor ``[..., n]``."""
    expect_tensor(name, value)
    expect_floating(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} has no dimension, expected [..., features]")


def expect_matrix(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is dense and has two dimensions."""
    expect_tensor(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected two dimensions")


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
    """Raise unless ``index`` is a one-dimensional int64 tensor."""
    expect_tensor(name, index)
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}, expected one-dimensional int64 row numbers"
        )


def outside(name: str, index: Tensor, rows: int, chosen: Tensor | None = None) -> ValueError:
    """The error for the first of the row numbers in ``index``, where ``chosen`` is not 0, that is no row of a table."""
    wrong = (index < 0) | (index >= rows)
    if chosen is not None:
        wrong &= chosen != 0
    place = int(wrong.nonzero()[0, 0])
    return ValueError(f"{name}[{place}] is {int(index[place])}, expected a row in [0, {rows})")


def expect_weights(name: str, weights: Tensor) -> None:
    """Raise ValueError for the first of the weights that is negative, where the host can see it."""
    if not weights.dtype.is_signed or not reads_at_once(weights) or not bool((wrong := weights < 0).any()):
        return
    place = wrong.nonzero()[0].tolist()
    raise ValueError(f"{name}{place} is {weights[tuple(place)].item()}, expected a weight >= 0")


def check_frozen(x: Any, in_features: int, dtype: torch.dtype) -> None:
    """Raise unless ``x [..., in_features]`` fits a frozen weight of ``dtype``."""
    expect_rows("x", x)
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {in_features}]")
    if x.dtype is not dtype and not autocast_enabled("cpu"):
        raise ValueError(
            f"x has dtype {x.dtype} and the frozen weight has {dtype}: convert one of them, or run under torch.autocast"
        )
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device} and the packed weight is on cpu: move one of them")


def check_panels(rows: Tensor, panels: Tensor, stored: torch.dtype) -> None:
    """Raise unless the kernels of a frozen weight can read rows ``[..., n]`` and bytes of panels."""
    expect_rows("rows", rows)
    expect_tensor("panels", panels)
    expect_device("panels", panels, "rows", rows.device)
    if rows.device.type != "cpu":
        raise ValueError(f"rows are on {rows.device}, expected the CPU: only its kernels read panels")
    if rows.dtype not in (torch.float32, stored):
        raise TypeError(f"rows have dtype {rows.dtype}, expected torch.float32 or the panels' {stored}")


def check_handoff(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """Raise unless ``rows [n, d]`` can be written to the rows ``slot_rows [n]`` of ``embeds [R, d]``."""
    expect_matrix("rows", rows)
    expect_matrix("embeds", embeds)
    expect_row_index("slot_rows", slot_rows)
    expect_shape("rows", rows, slot_rows.shape[0], embeds.shape[1])
    if embeds.numel() > 0 and embeds.shape[1] > 1 and embeds.stride(1) != 1:
        raise ValueError(f"embeds have stride {embeds.stride(1)} between elements, expected 1")
    if rows.dtype is not embeds.dtype:
        expect_floating("rows", rows)
        expect_floating("embeds", embeds)
    expect_device("rows", rows, "embeds", embeds.device)
    expect_device("slot_rows", slot_rows, "embeds", embeds.device)


def check_handoff_gradient(dy: Tensor, slot_rows: Tensor) -> None:
    """Raise unless ``slot_rows [n]`` can name rows of ``dy [R, d]``."""
    expect_matrix("dy", dy)
    expect_row_index("slot_rows", slot_rows)
    expect_device("slot_rows", slot_rows, "dy", dy.device)


def check_alignment(pred: Tensor, target: Tensor, token_ids: Tensor | None, mask: Tensor | None) -> None:
    """Raise unless the tensors of the alignment loss fit each other."""
    expect_rows("pred", pred)
    expect_rows("target", target)
    if token_ids is not None:
        expect_tensor("token_ids", token_ids)
    if mask is not None:
        expect_tensor("mask", mask)
        if mask.dtype.is_complex:
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool or a weight per row")
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
