"""CUDA graphs on fake devices: streams, captures, replays, and what torch leaves behind when a capture fails.

A capture records the operations that go to its stream, executes none of them, and fails where the host waits for the
device. A replay executes what was recorded on the tensors that were recorded, whatever they hold then. As in torch,
`torch.cuda.graph` without a stream takes one of the device on which it was first used, and a capture that fails leaves
its stream current, the allocator in its pool and the random generator capturing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from recmas.engine import step_graph
from tests.runtime.fake_devices import KIND, FakeDevices, _Placed, leaves, on_host

DEVICES = 2
LOST = """CUDA error: unspecified launch failure
Search for `cudaErrorLaunchFailure' in its documentation for more information.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = FakeGraphs.here.current if device is None else torch.device(device)

    def wait_stream(self, other: FakeStream) -> None:
        assert other.device == self.device


class FakeGenerator:
    def __init__(self, capturing: bool = False) -> None:
        self.capturing = capturing

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator(self.capturing)

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.capturing = other.capturing


@dataclass
class FakeGraph:
    """A recorded graph, in host memory.

    Attributes:
        operations: functions, their arguments, and what a replay writes of their results: by number, and where to.
        devices: of all tensors.
    """

    operations: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = field(default_factory=list)
    devices: set[torch.device] = field(default_factory=set)
    broken: bool = False

    def replay(self) -> None:
        FakeGraphs.here.replays += 1
        if FakeGraphs.here.lost in self.devices:
            raise torch.AcceleratorError(LOST)
        with _disable_current_modes():
            for func, args, kwargs, made in self.operations:
                again = leaves([func(*args, **kwargs)])
                for number, held in made:
                    held.copy_(again[number])


class _Capture:
    """`torch.cuda.graph`."""

    default_stream: FakeStream | None = None

    def __init__(
        self,
        graph: FakeGraph,
        pool: int | None = None,
        stream: FakeStream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        if stream is None:
            stream = _Capture.default_stream = _Capture.default_stream or FakeStream()
        self.graph, self.pool, self.stream, self.mode = graph, pool, stream, capture_error_mode

    def __enter__(self) -> None:
        here = FakeGraphs.here
        self.before = here.enter(self.stream)
        here.modes.add(self.mode)
        here.pools.add((self.stream.device.index, self.pool))
        here.generators[self.stream.device.index].capturing = True
        here.capture = self

    def __exit__(self, *raised: Any) -> None:
        here = FakeGraphs.here
        here.capture = None
        if self.graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        here.pools.remove((self.stream.device.index, self.pool))
        here.generators[self.stream.device.index].capturing = False
        here.leave(self.before)


class FakeGraphs(FakeDevices):
    """The block in which fake devices capture graphs.

    Attributes:
        current: the current device.
        streams: the current stream of each device.
        pools: device and pool of what the allocator takes for a capture under way.
        released: pools that were given up.
        generators: the random generator of each device.
        modes: of all captures.
        lost: a device that has disappeared: whatever is asked of it fails, as CUDA's errors outlast the call.
        replays: so far.
        waited: how often the host waited for a device.
    """

    here: FakeGraphs

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        FakeGraphs.here, _Capture.default_stream = self, None
        self.current = torch.device(KIND, 0)
        self.streams = [FakeStream(torch.device(KIND, index)) for index in range(DEVICES)]
        self.generators = [FakeGenerator() for _ in range(DEVICES)]
        self.pools: set[tuple[int, Any]] = set()
        self.released: list[Any] = []
        self.modes: set[str] = set()
        self.lost: torch.device | None = None
        self.capture: _Capture | None = None
        self.replays, self.waited, self._handles, self._debug = 0, 0, 0, 0
        fakes = {
            "device": self._on,
            "stream": self._within,
            "current_stream": lambda device=None: self.streams[(device or self.current).index],
            "Stream": FakeStream,
            "CUDAGraph": FakeGraph,
            "graph": _Capture,
            "graph_pool_handle": self._handle,
            "default_generators": self.generators,
            "get_sync_debug_mode": lambda: self._debug,
            "set_sync_debug_mode": self._set_debug,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: self.released.append(pool), raising=False)
        patch.setattr(step_graph, "KIND", KIND)
        patch.setattr(FakeDevices, "waits", staticmethod(self._waits))

    def clean(self) -> bool:
        """Whether nothing is as during a capture."""
        capturing = any(generator.capturing for generator in self.generators)
        return not self.pools and not capturing and self.current.index == 0 and self.streams == self._first

    def __enter__(self) -> FakeGraphs:
        self._first = list(self.streams)
        super().__enter__()
        return self

    def reach(self, *used: Any) -> None:
        """Fail if the device of one of these tensors has disappeared."""
        if self.lost is not None and any(isinstance(t, _Placed) and t.device == self.lost for t in leaves(used)):
            raise torch.AcceleratorError(LOST)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reach(args, kwargs or {})
        if (capture := self.capture) is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, _Placed)]
        asked = kwargs.get("device")
        place = given[0].device if given else torch.device("cpu" if asked is None else asked)
        if place.type != KIND or self.streams[place.index] is not capture.stream:
            return super().__torch_dispatch__(func, types, args, kwargs)
        before = [(tensor.held, tensor.held.clone()) for tensor in given] if func._schema.is_mutable else []
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for held, values in before:
            held.copy_(values)
        aliases = {tensor.held.untyped_storage().data_ptr() for tensor in given}
        made = [
            (number, leaf.held)
            for number, leaf in enumerate(leaves([found]))
            if isinstance(leaf, _Placed) and leaf.held.untyped_storage().data_ptr() not in aliases
        ]
        for _, held in made:
            held.fill_(torch.nan if held.is_floating_point() else 0)
        options = dict(zip(kwargs, on_host(kwargs.values(), []), strict=True))
        capture.graph.operations.append((func, on_host(args, []), options, made))
        capture.graph.devices |= {tensor.device for tensor in given} | {place}
        return found

    def enter(self, stream: FakeStream) -> tuple[FakeStream, torch.device]:
        before = self.streams[stream.device.index], self.current
        self.streams[stream.device.index], self.current = stream, stream.device
        return before

    def leave(self, before: tuple[FakeStream, torch.device]) -> None:
        stream, self.current = before
        self.streams[stream.device.index] = stream

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _within(self, stream: FakeStream) -> Iterator[None]:
        before = self.enter(stream)
        try:
            yield
        finally:
            self.leave(before)

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _end_pool(self, index: int, pool: Any) -> None:
        if (index, pool) not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove((index, pool))

    def _set_debug(self, mode: int | str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)
        self._debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if isinstance(mode, str) else mode

    def _waits(self, device: torch.device) -> None:
        self.waited += 1
        if self.capture is not None:
            self.capture.graph.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self._debug:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=4)
