"""What depends on the type of a tensor's device: autocast, and whether its values can be read without waiting."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_has_autocast = cache(torch.amp.is_autocast_available)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; False for devices that have none, such as "meta"."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a link computes in: autocast's where it is on (it leaves float64 alone), else x's."""
    device_type = x.device.type
    if autocast_enabled(device_type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def reads_at_once(tensor: Tensor) -> bool:
    """Whether the host can read a value of ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"
