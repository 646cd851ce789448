"""Devices that this machine does not have: tensors that say they live there, and refuse to meet others.

Within `FakeDevices`, a tensor moved to or made on a device of `KIND` carries its values in host memory, but every
operation that it takes part in must find all its tensors on that one device, as on a real one. Copies between devices
are counted. For inference; kernels run as they do on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KIND = "meta"
ADDRESS = "data_ptr"
READS = ("__int__", "__float__", "__bool__", "__index__", "item", "tolist")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def leaves(tree: Iterable[Any], found: list[Any] | None = None) -> list[Any]:
    """What lists, tuples and dictionaries hold, as operators take and give them; torch's own is far slower."""
    found = [] if found is None else found
    for part in tree:
        if isinstance(part, dict):
            leaves(part.values(), found)
        elif isinstance(part, list | tuple):
            leaves(part, found)
        else:
            found.append(part)
    return found


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(change, part) for part in tree])
    return {name: mapped(change, part) for name, part in tree.items()} if isinstance(tree, dict) else change(tree)


class _Placed(torch.Tensor):
    """Values in host memory under the name of another device."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> _Placed:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self.held = values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:  # torch would ask the device's own driver to wait
            FakeDevices.waits(args[0].device)
        if name in READS or name == ADDRESS:
            return func(args[0].held, *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of a fake device left FakeDevices")


def on_host(tree: Iterable[Any], given: list[torch.Tensor]) -> list[Any]:
    """Arguments as they stand in host memory; tensors among them are added to `given` as they came."""
    found: list[Any] = []
    for part in tree:
        kind = type(part)
        if kind is _Placed:
            given.append(part)
            found.append(part.held)
        elif kind is list or kind is tuple:
            found.append(kind(on_host(part, given)))
        elif kind is torch.device and part.type == KIND:
            found.append(torch.device("cpu"))
        else:
            if isinstance(part, torch.Tensor):
                given.append(part)
            found.append(part)
    return found


class FakeDevices(TorchDispatchMode):
    """The block in which fake devices exist.

    Attributes:
        crossed: shape, source and target of every floating-point tensor that went from one device to another.
    """

    waits: Callable[[torch.device], None] = staticmethod(lambda device: None)
    """Called with the device whose results the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[tuple[tuple[int, ...], str, str]] = []

    def __enter__(self) -> FakeDevices:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=fake): made on the CPU, then moved
        self._autocast = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda kind=None: kind != KIND and (self._autocast(kind) if kind else False)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.is_autocast_enabled = self._autocast
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; torch would wrap every call below, which takes as long as the call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, []
        on_it, options = on_host(args, given), on_host(kwargs.values(), given)
        owners = {id(tensor.held): tensor for tensor in given if type(tensor) is _Placed}
        asked = kwargs.get("device")
        if not owners and (asked is None or asked.type != KIND):
            return func(*args, **kwargs)
        places = {tensor.device for tensor in given if type(tensor) is _Placed or tensor.dim() > 0}
        place = asked if asked is not None else next(iter(places))
        if func in MOVES:
            target = place if func is MOVES[0] else args[0].device
            source = args[0] if func is MOVES[0] else args[1]
            if source.device.type == KIND and target.type != KIND:
                FakeDevices.waits(source.device)
            if source.device != target and source.is_floating_point():
                self.crossed.append((tuple(source.shape), str(source.device), str(target)))
            place = target
        elif len(places) > 1:
            raise RuntimeError(f"{func}: tensors on {', '.join(sorted(map(str, places)))}")

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or place.type != KIND:
                return leaf
            return owners.get(id(leaf)) if id(leaf) in owners else _Placed(leaf, place)

        return mapped(wrap, func(*on_it, **dict(zip(kwargs, options, strict=True))))
