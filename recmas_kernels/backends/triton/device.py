"""Device functions that several kernels share: GELU and its derivative, in float32; and what surrounds a launch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

_HALF_SQRT_2 = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_SLOPE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.044715)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class launching:
    """Around every launch of an op: makes the tensor's device current and words what Triton reports of a failure.

    Triton launches on the current device, not on that of the tensors, and its errors name neither op nor sizes. A
    kernel cannot be loaded while a CUDA graph is being recorded: the first call of its kind must come before that.
    """

    def __init__(self, op: str, tensor: torch.Tensor) -> None:
        self.op = op
        self.tensor = tensor
        self.device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

    def __enter__(self) -> None:
        self.device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.device.__exit__(kind, error, trace)
        launch = isinstance(error, OutOfResources) or str(error).startswith("Triton Error")
        if error is None or not launch:
            return
        shape, dtype = " x ".join(map(str, self.tensor.shape)), str(self.tensor.dtype).removeprefix("torch.")
        hint = ""
        if "captur" in str(error):
            hint = (
                "; a kernel is compiled and loaded in its first call, which cannot be recorded in a CUDA graph: "
                "make the same call once before recording"
            )
        raise RuntimeError(f"{self.op} on {self.tensor.device}, {shape} in {dtype}: {error}{hint}") from error


def dot_precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` does with float32 operands: what torch's own matmul may do with them."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def within(index, width, WHOLE: tl.constexpr):
    """``index < width``; constant, so that masks vanish, where every tile is known to be whole."""
    if WHOLE:
        return tl.full(index.shape, True, tl.int1)
    return index < width


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """The four quarters of a tile's columns, left to right. Pointwise work on one after the other does not spill."""
    left, right = _halves(tile)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def gelu(p, TANH: tl.constexpr):
    """``gelu(p)`` of float32 ``p``: p Phi(p), or its tanh form, p sigmoid(2 t), which needs no tanh."""
    if TANH:
        t = _TANH_SLOPE * (p + _TANH_CUBIC * p * p * p)
        return p / (1 + tl.exp(-2 * t))
    return 0.5 * p * (1 + tl.erf(p * _HALF_SQRT_2))


@triton.jit
def gelu_and_slope(p, TANH: tl.constexpr):
    """``(gelu(p), gelu'(p))`` of float32 ``p``; the slope of the erf form is Phi(p) + p phi(p)."""
    if TANH:
        t = _TANH_SLOPE * (p + _TANH_CUBIC * p * p * p)
        small = tl.exp(-2 * tl.abs(t))  # of |t|, so that s (1 - s) neither cancels nor overflows
        major = 1 / (1 + small)
        minor = small * major
        dt = _TANH_SLOPE * (1 + 3 * _TANH_CUBIC * p * p)
        s = tl.where(t >= 0, major, minor)
        return p * s, s + 2 * p * (major * minor) * dt
    cdf = 0.5 * (1 + tl.erf(p * _HALF_SQRT_2))
    pdf = _INVERSE_SQRT_2PI * tl.exp(-0.5 * p * p)
    return p * cdf, cdf + p * pdf
