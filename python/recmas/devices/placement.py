"""The device of every role: one device for all, or a device by role.

An inner link is on its agent's device, an outer link (and its score) on the receiver's: what crosses between two
devices is the latents of a handoff, once, in the sender's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Device = str | torch.device
Devices = Device | Mapping[str, Device]


def place(devices: Devices, roles: Sequence[str], unnamed: Mapping[str, torch.device] | None = None) -> Placement:
    """The device of every role.

    Args:
        devices: one for all, or by role.
        roles: of the pattern.
        unnamed: of roles that a mapping leaves out; None is the CPU.

    Raises:
        ValueError: an unknown role, or a device that cannot be used here; before anything is loaded or moved.
    """
    if not isinstance(devices, Mapping):
        return dict.fromkeys(roles, _usable(devices))
    for role in devices:
        if role not in roles:
            raise ValueError(f"device: unknown role {role!r}; the pattern has {', '.join(roles)}")
    others = dict.fromkeys(roles, torch.device("cpu")) if unnamed is None else unnamed
    return {role: _usable(devices[role]) if role in devices else others[role] for role in roles}


Placement = dict[str, torch.device]


def _usable(device: Device) -> torch.device:
    """The device with its number, after a tensor has been there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # the last from a torch built without CUDA
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"device: {str(device)!r} cannot be used here: {reason}") from None
