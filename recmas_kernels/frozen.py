"""Products of frozen weights: the packed form, and a call's way to the kernel.

A `Panels` is all that is left of a packed weight. It holds every value exactly, so that the weight comes back from it
bit by bit: a float32 weight that came from a 16-bit checkpoint is kept in those 16 bits, and read at half the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from recmas_kernels import autograd, checks, ops, serve
from recmas_kernels.backends import cpu, settings
from recmas_kernels.backends.choice import requested
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.observed import observed, traced, transformed
from recmas_kernels.replaced import functions_replaced, has_functions, is_for_torch

_PLAIN = (Parameter, Tensor, type(None))
_EXACT_CHUNK = 1 << 22  # elements compared at a time


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight ``[out_features, in_features]`` in the layout that the CPU kernels stream.

    Attributes:
        data: uint8, the panels.
        out_features, in_features: of the weight.
        dtype: of the weight, as its owner sees it.
        stored: of the panels' elements, which hold the weight's values exactly.
        columns: ``(in_features,)``, the last dimension of rows that fit.
    """

    data: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    stored: torch.dtype
    columns: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", torch.Size([self.in_features]))

    def weight(self) -> Tensor:
        """The weight as it was: a new tensor, equal bit by bit."""
        unpack = ops.frozen_weight if traced() else cpu.unpack_frozen  # whoever traces has to see where it comes from
        weight: Tensor = unpack(self.data, self.out_features, self.in_features, self.stored)
        return weight.to(self.dtype)


def why_not_packed(weight: Tensor) -> str | None:
    """Why no `Panels` can be made of a weight; None if it can."""
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels have no {str(weight.dtype).removeprefix('torch.')}"
    if weight.layout is not torch.strided or type(weight) not in (Tensor, Parameter):
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}"
    if weight.numel() == 0:
        return "a size is 0"
    if weight.dtype is torch.float16 and bool(weight.isnan().any()):
        return "it holds NaN, of which float16 panels do not keep every bit"
    return cpu.unavailable()


@contextmanager
def for_later() -> Iterator[None]:
    """What is made inside is kept: it may be used elsewhere, so no mode or transform that is active now may wrap it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch._C._DisableFuncTorch():
        yield


def pack(weight: Tensor) -> Panels:
    """The panels of a frozen weight ``[out_features, in_features]``.

    Raises:
        ValueError: there can be none; see `why_not_packed`.
    """
    reason = why_not_packed(weight)
    if reason is not None:
        raise ValueError(f"weight cannot be packed: {reason}")
    with for_later():
        weight = weight.detach().contiguous()
        narrow = _narrowed(weight)
        data = cpu.pack_frozen(narrow)
    out_features, in_features = weight.shape
    return Panels(data, out_features, in_features, weight.dtype, narrow.dtype)


def _narrowed(weight: Tensor) -> Tensor:
    """``weight`` in the smallest dtype that holds every value of it exactly.

    Bits are compared, not values: processors may be set to take denormal numbers for zero. bfloat16 is for finite
    values alone: its products may split rows into parts (csrc/cpu/split.h), and a part that is 0 times infinity is NaN.
    """
    if weight.dtype is torch.float32:
        parts = [part.view(torch.int32) for part in weight.view(-1).split(_EXACT_CHUNK)]
        if all(_fits_bfloat16(bits) for bits in parts):
            return torch.cat([(bits >> 16).to(torch.int16) for bits in parts]).view(torch.bfloat16).view(weight.shape)
        if all(_fits_float16(bits) for bits in parts):
            return weight.half()
    return weight


def _fits_bfloat16(bits: Tensor) -> bool:
    return not bool((bits & 0xFFFF).any()) and bool(bits.view(torch.float32).isfinite().all())


def _fits_float16(bits: Tensor) -> bool:
    part = bits.view(torch.float32)
    return torch.equal(part.half().float().view(torch.int32), bits) and not bool(part.isnan().any())


def stand_in(weight: Tensor) -> Tensor:
    """What a packed weight's parameter holds meanwhile: NaN of the same shape, all of them one element of memory."""
    with for_later():
        return torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device).as_strided(weight.shape, (0, 0))


def is_stand_in(weight: Tensor) -> bool:
    """Whether ``weight`` is from `stand_in`, as it is or wrapped by a transform."""
    return weight.stride() == (0, 0)


def expect_unwritten(stand_in: Tensor) -> None:
    """Under ``RECMAS_CHECK=1``, raise RuntimeError if somebody wrote into a packed weight's parameter."""
    if settings.checks() and not bool(stand_in.detach().isnan().all()):
        raise RuntimeError("weight was written while it is packed: the write is lost; unpack the layer, then write")


def explain(x: Tensor, panels: Panels) -> str:
    """Who would serve `frozen_linear` on ``x [..., in_features]``."""
    sizes = f"{x.numel() // max(1, x.shape[-1])} x {panels.in_features} -> {panels.out_features}"
    if requested() not in ("auto", "cpu"):
        served = f"reference: serves this call ({requested()!r} was asked for), from an unpacked copy"
    elif functions_replaced():
        served = "plain torch: serves this call, whose functions were replaced or may be, from an unpacked copy"
    else:
        stored, isa = str(panels.stored).removeprefix("torch."), cpu.instruction_set()[0]
        served = f"cpu: serves this call ({isa}, panels of {stored}); it was faster for every number of rows measured"
    return f"frozen_linear cpu {str(x.dtype).removeprefix('torch.')} {sizes}:\n  {served}"


def frozen_linear(x: Tensor, panels: Panels, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a packed weight; it has a gradient of x alone.

    Args:
        x: ``[..., in_features]`` in the weight's dtype, any strides, any number of rows including none.
        panels: of W ``[out_features, in_features]``, from `pack`.
        bias: ``[out_features]``, or None.

    Returns:
        ``[..., out_features]`` in x's dtype; under autocast in autocast's. Sums are float32.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        TypeError: x is no dense floating-point tensor.
    """
    ordinary = not observed() and not functions_replaced() and type(x) is Tensor and x.is_cpu and type(bias) in _PLAIN
    ordinary = ordinary and not (x.is_neg() or x._is_zerotensor() or is_for_torch(x))
    if not ordinary and not torch.compiler.is_compiling() and _needs_plain_torch(x, bias):
        return F.linear(x, panels.weight(), bias)
    if not (ordinary and x.dtype is panels.dtype and x.shape[-1:] == panels.columns):
        checks.check_frozen(x, panels.in_features, panels.dtype)
    if not torch.compiler.is_compiling() and requested() not in ("auto", "cpu"):
        return F.linear(x, panels.weight(), bias)
    if autocast_enabled("cpu"):
        return _autocast(x, panels, bias)
    return _product(x, panels, bias, ordinary)


def _needs_plain_torch(x: Any, bias: Tensor | None) -> bool:
    """Whether the op has no rule for such rows, or somebody may replace the function that a plain layer calls."""
    if not isinstance(x, Tensor):  # for the checks to refuse
        return False
    if transformed() or functions_replaced() or has_functions(x) or has_functions(bias):
        return True
    return is_for_torch(x) or is_traceable_wrapper_subclass(x)


def serves_in_place(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `in_place_linear` takes these: few rows, no gradients, no autocast, and nothing that observes."""
    if observed() or functions_replaced() or type(x) is not Tensor or is_for_torch(x):
        return False
    if not (x.is_cpu and weight.is_cpu):
        return False
    if x.is_neg() or x._is_zerotensor():
        return False
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN or not weight.is_contiguous():
        return False
    if x.dtype is not weight.dtype or not cpu.reads(x.dtype):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    rows = x.numel() // max(1, x.shape[-1]) if x.shape[-1:] == weight.shape[1:] else 0
    return 0 < rows <= cpu.MOST_STREAMED and requested() in ("auto", "cpu") and not autocast_enabled("cpu")


def in_place_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of a weight ``[out_features, in_features]`` that is read as it lies."""
    return cpu.frozen_linear(x, weight, bias, weight.shape[0], weight.dtype)


def _product(x: Tensor, panels: Panels, bias: Tensor | None, ordinary: bool) -> Tensor:
    arguments: tuple[Any, ...] = (x, panels.data, bias, panels.out_features, panels.stored)
    if not ordinary:
        y: Tensor = ops.frozen_linear(*arguments)
        return y
    if x.requires_grad and torch.is_grad_enabled():
        return autograd.frozen(*arguments)
    return serve.frozen_linear(*arguments)


def _autocast(x: Tensor, panels: Panels, bias: Tensor | None) -> Tensor:
    """Rows and result are rounded as autocast does; a float32 weight is not rounded."""
    dtype = torch.get_autocast_dtype("cpu")
    if panels.dtype not in (dtype, torch.float32):  # a weight of the other 16 bits may become infinite
        return F.linear(x, panels.weight(), bias)
    with torch.autocast("cpu", enabled=False):
        rows = x.to(dtype)
        return _product(rows if dtype is panels.stored else rows.float(), panels, bias, ordinary=False).to(dtype)
