"""What depends on the type of a tensor's device: autocast, and whether its values can be read without waiting."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_has_autocast = cache(torch.amp.is_autocast_available)


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, which makes a string at each look."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on; False for devices that have none, such as "meta"."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a link computes in: autocast's where it is on (it leaves float64 alone), else x's."""
    device = device_type(x)
    if autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def reads_at_once(tensor: Tensor) -> bool:
    """Whether the host can read a value of ``tensor`` without waiting for a device."""
    return tensor.is_cpu
