"""Copies of tensors on other devices, which stand for their originals as long as nobody writes to either."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_OF = "copied_from"


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, which learns nothing; on a CUDA device it may still be under way."""
    copy: Tensor = tensor.detach().to(device, non_blocking=True)
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=False)
    copy.__dict__[_OF] = tensor, version(tensor), version(copy)
    return copy


def original(tensor: Tensor) -> Tensor:
    """Whose copy a tensor is; the tensor itself if it is none, or if one of both was written since."""
    found, *written = tensor.__dict__.get(_OF, (tensor, 0, 0))
    return found if found is tensor or written == [version(found), version(tensor)] else tensor


def version(tensor: Tensor) -> int:
    """How often a tensor was written; those made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version
