"""Copies of tensors on other devices, which stand for their originals as long as nobody writes to either.

Who stands for whom is in a table, not on the tensors: what is on a tensor is pickled with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Stamp = tuple[int, int, torch.dtype, torch.device]
_ORIGINALS: dict[int, tuple[Tensor, Stamp, Tensor, Stamp]] = {}
"""By address of a copy: the copy, its stamp, its original and that one's stamp."""


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, which learns nothing; on a CUDA device it may still be under way."""
    copy: Tensor = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def stand_for(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Have copies stand for their originals until they are forgotten: ``(copy, original)`` each."""
    _ORIGINALS.update({id(copy): (copy, stamp(copy), home, stamp(home)) for copy, home in pairs})


def forget(copies: Iterable[Tensor]) -> None:
    """Let go of copies and their originals."""
    for copy in copies:
        del _ORIGINALS[id(copy)]


def original(tensor: Tensor) -> Tensor:
    """Whose copy a tensor is; the tensor itself if it is none, or if one of both was written since."""
    known = _ORIGINALS.get(id(tensor))
    if known is None:
        return tensor
    copy, then, home, before = known
    return home if stamp(copy) == then and stamp(home) == before else tensor


def stamp(tensor: Tensor) -> Stamp:
    """How often a tensor was written, where its elements are, and what they are.

    Tensors that were made in inference mode do not count writes.
    """
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return 0 if tensor.is_inference() else tensor._version, address, tensor.dtype, tensor.device
