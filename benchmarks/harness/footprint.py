"""What a call costs beside time: operators launched and memory allocated, counted in a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Launches(TorchDispatchMode):
    """Counts operators that compute, views left out; what runs inside one operator belongs to that operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Footprint:
    """Of one call.

    Attributes:
        launches: operators dispatched; None for compiled code, which launches its own.
        peak_bytes: most memory that torch's allocator held at once beyond what it held before.
    """

    launches: int | None
    peak_bytes: int

    @classmethod
    def of(cls, call: Callable[[], object], compiled: bool = False) -> Footprint:
        launches = None
        if not compiled:
            with _Launches() as counter:
                call()
            launches = counter.count
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            call()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        held = peak = 0
        for _, change in changes:
            held += change
            peak = max(peak, held)
        return cls(launches, peak)
