"""Weights that rest in host memory and are on their device for the visits of their agent alone.

A device then has to hold its largest agent, not all of them. Agents are frozen, so nothing is copied back: the lent
copies are dropped, and the weights at home take their places again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from recmas.placement import Placement


class Lender:
    """Lends the modules of one role at a time to the role's device.

    Modules that two roles in a row both need stay where they are. If lending fails, nothing has been changed.

    Args:
        placement: where each role works.
        modules: what each role works with, all in host memory: its model, and the links that live with it. Where the
            role's device is a CUDA device, their parameters are moved to pinned memory, from which copies are faster.
    """

    def __init__(self, placement: Placement, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        self.placement = placement
        self._modules = {role: list(parts) for role, parts in modules.items()}
        self._lent: dict[nn.Module, tuple[torch.device, Callable[[], None]]] = {}
        for role, parts in self._modules.items():
            for part in parts:
                if any(parameter.device.type != "cpu" for parameter in part.parameters()):
                    raise ValueError(f"offload: the weights of {role!r} are not in host memory")
                if placement[role].type == "cuda":
                    for parameter in part.parameters():
                        if not parameter.data.is_pinned():
                            parameter.data = parameter.data.pin_memory()

    def bring(self, role: str) -> None:
        """Put what `role` works with on its device, and whatever else is there back home first."""
        device, wanted = self.placement[role], self._modules[role]
        for module, (where, home) in list(self._lent.items()):
            if (module in wanted) != (where == device):
                home()
                del self._lent[module]
        if device.type != "cpu":
            for module in wanted:
                if module not in self._lent:
                    self._lent[module] = device, _lend(module, device)

    def rest(self) -> None:
        """Everything goes home."""
        for _, home in self._lent.values():
            home()
        self._lent.clear()

    def to_come(self, device: torch.device) -> int:
        """Bytes that `device` must still find room for when its largest role visits it."""
        roles = [role for role, place in self.placement.items() if place == device and device.type != "cpu"]
        most = max((sum(map(_bytes, self._modules[role])) for role in roles), default=0)
        return most - sum(_bytes(module) for module, (where, _) in self._lent.items() if where == device)


def _lend(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Put copies on `device` in the places of a module's tensors; what it returns undoes that."""
    owners = list(module.modules())
    parameters = [
        (owner, name, kept) for owner in owners for name, kept in owner._parameters.items() if kept is not None
    ]
    buffers = [(owner, name, kept) for owner in owners for name, kept in owner._buffers.items() if kept is not None]
    copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for _, _, kept in parameters:
        if id(kept) not in copies:
            copy = kept.detach().to(device, non_blocking=True)
            copies[id(kept)] = nn.Parameter(copy, requires_grad=False)
    moved: list[Tensor] = [kept.to(device, non_blocking=True) for _, _, kept in buffers]
    for owner, name, kept in parameters:
        owner._parameters[name] = copies[id(kept)]
    for (owner, name, _), buffer in zip(buffers, moved, strict=True):
        owner._buffers[name] = buffer

    def home() -> None:
        for owner, name, kept in parameters:
            owner._parameters[name] = kept
        for owner, name, lent in buffers:
            now = owner._buffers[name]
            owner._buffers[name] = None if now is None else now.to(lent.device)  # a model may have changed it

    return home


def _bytes(module: nn.Module) -> int:
    return sum(kept.numel() * kept.element_size() for kept in [*module.parameters(), *module.buffers()])
