"""Tensors as the kernels can read them, converted where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels.backends.cpu.module import DTYPES
from recmas_kernels.reference import LinkArguments

_VECTORS = ("b1", "b2", "b3", "norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")


def matrix(weight: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """A weight matrix that the kernels can read: contiguous, in fp32 or the compute dtype."""
    if weight is None:
        return None
    return (weight if weight.dtype in (compute, torch.float32) else weight.to(compute)).contiguous()


def vector(tensor: Tensor | None) -> Tensor | None:
    """A bias or gain that the kernels can read: contiguous, in fp32, bf16 or fp16."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)).contiguous()


def rows(tensor: Tensor) -> Tensor:
    """Rows that the kernels can read: contiguous along the last dimension, in fp32, bf16 or fp16."""
    if tensor.dtype not in DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def link(arguments: LinkArguments) -> LinkArguments:
    """The same call with tensors that the kernels can read, converted where they are not."""
    x, compute = rows(arguments.x), arguments.dtype
    matrices = {name: matrix(getattr(arguments, name), compute) for name in ("w1", "w2", "w3")}
    vectors = {name: vector(getattr(arguments, name)) for name in _VECTORS}
    return arguments._replace(x=x, **matrices, **vectors)  # type: ignore[arg-type]
