"""Offload: weights stay in host memory, and a copy is on the device only while its role works.

A device then has to hold its largest role, not all of them. Weights are frozen, so nothing is copied back: the device
copies are dropped, and the host's weights take their places in the modules again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from recmas.copies import copied, forget, stand_for
from recmas.devices.placement import Placement


class Offloader:
    """Copies the modules of one role at a time to the role's device.

    Modules that two consecutive roles both need stay where they are. If copying fails, nothing has been changed.

    Args:
        placement: where each role works.
        modules: what each role works with, all in host memory: its model, and the links that live with it. Where the
            role's device is a CUDA device, their parameters are moved to pinned memory, from which copies are faster.
    """

    def __init__(self, placement: Placement, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        self.placement = placement
        self._modules = {role: list(parts) for role, parts in modules.items()}
        self._copied: dict[nn.Module, tuple[torch.device, Callable[[], None]]] = {}
        for role, parts in self._modules.items():
            for part in parts:
                if any(parameter.device.type != "cpu" for parameter in part.parameters()):
                    raise ValueError(f"offload: the weights of {role!r} are not in host memory")
                if placement[role].type == "cuda":
                    for parameter in part.parameters():
                        if not parameter.data.is_pinned():
                            parameter.data = parameter.data.pin_memory()

    def load(self, role: str) -> None:
        """Put what `role` works with on its device, after everything else has left it."""
        device, wanted = self.placement[role], self._modules[role]
        for module, (where, restore) in list(self._copied.items()):
            if (module in wanted) != (where == device):
                restore()
                del self._copied[module]
        if device.type != "cpu":
            for module in wanted:
                if module not in self._copied:
                    self._copied[module] = device, _copy_to(module, device)

    def unload(self) -> None:
        """Drop all copies; the modules hold the host's weights again."""
        for _, restore in self._copied.values():
            restore()
        self._copied.clear()

    def bytes_to_load(self, device: torch.device) -> int:
        """Bytes that `device` must still find room for when its largest role works there."""
        roles = [role for role, place in self.placement.items() if place == device and device.type != "cpu"]
        most = max((sum(map(_bytes, self._modules[role])) for role in roles), default=0)
        return most - sum(_bytes(module) for module, (where, _) in self._copied.items() if where == device)


def _copy_to(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Put copies on `device` in the places of a module's tensors; the returned function puts the originals back."""
    owners = list(module.modules())
    parameters = [
        (owner, name, kept) for owner in owners for name, kept in owner._parameters.items() if kept is not None
    ]
    buffers = [(owner, name, kept) for owner in owners for name, kept in owner._buffers.items() if kept is not None]
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    for _, _, kept in parameters:
        if id(kept) not in copies:
            copies[id(kept)] = copied(kept, device)
    moved = [copied(kept, device) for _, _, kept in buffers]
    homes = {id(copy): home for copy, (_, _, home) in zip(moved, buffers, strict=True)}
    stand_for([(copies[id(kept)], kept) for _, _, kept in parameters])
    stand_for((copy, homes[id(copy)]) for copy in moved)
    for owner, name, kept in parameters:
        owner._parameters[name] = cast(nn.Parameter, copies[id(kept)])
    for (owner, name, _), buffer in zip(buffers, moved, strict=True):
        owner._buffers[name] = buffer

    def restore() -> None:
        for owner, name, kept in parameters:
            owner._parameters[name] = kept
        for owner, name, home in buffers:
            now = owner._buffers[name]  # a model may have changed it
            owner._buffers[name] = None if now is None else _back(now, homes.get(id(now)), home.device)
        forget([*copies.values(), *moved])

    return restore


def _back(now: Tensor, home: Tensor | None, device: torch.device) -> Tensor:
    """A buffer after the visit: the one at home, unless there are others' values in its copy, counted or not."""
    with torch.inference_mode(False):  # it may be written elsewhere, and later
        back = now.to(device)
        if home is None or back.dtype is not home.dtype or not torch.equal(back, home):
            return back
    return home


def _bytes(module: nn.Module) -> int:
    return sum(kept.numel() * kept.element_size() for kept in [*module.parameters(), *module.buffers()])
