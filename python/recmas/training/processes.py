"""The processes of a run: `accelerate launch` starts several of the same command, and Accelerate joins them.

A step's batches are dealt out among them, and their gradients are summed. So what a run computes depends on its
settings alone: on another number of processes it gives the same links, but for the order of sums. One process writes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

PATIENCE = timedelta(hours=12)
"""How long a process waits for the one that writes; a process that has ended is noticed at once."""


class Processes:
    """Those of this run.

    Args:
        joined: Accelerate's state; None where there is one process.

    Attributes:
        count: of processes.
        index: of this one.
        writes: whether this one writes files and shows bars.
    """

    def __init__(self, joined: Any = None) -> None:
        self._joined = joined
        self.count: int = 1 if joined is None else joined.num_processes
        self.index: int = 0 if joined is None else joined.process_index
        self.writes = self.index == 0

    @property
    def device(self) -> torch.device:
        """Messages go through it."""
        device: torch.device = torch.device("cpu") if self._joined is None else self._joined.device
        return device

    def share(self, batches: int) -> range:
        """Of a step's batches, those of this process."""
        return range(self.index, batches, self.count)

    def check(self, accumulation: int) -> None:
        """Raise ValueError unless a step's batches can be dealt out evenly."""
        if accumulation % self.count:
            raise ValueError(
                f"accumulation: {accumulation} batches per step cannot be dealt out among {self.count} processes; "
                f"give a multiple of {self.count} (--accumulation {self.count})"
            )

    def wait(self) -> None:
        """Until all are here."""
        if self._joined is not None:
            self.sums([0.0])

    def sums(self, values: Sequence[float]) -> list[float]:
        """Over all processes, of one value each; in float64."""
        if self._joined is None:
            return list(values)
        return self._sum(torch.tensor(values, dtype=torch.float64, device=self._joined.device)).tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter], numbers: Sequence[float] = ()) -> list[float]:
        """Replace each parameter's gradient by the sum over all processes; one that none has stays None.

        ``numbers`` go with them, since a message takes longer than a few more bytes in it.

        Returns:
            Sums of the numbers over all processes, in float64.
        """
        if self._joined is None:
            return list(numbers)
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        if not groups:
            return self.sums(numbers)
        sums: list[float] = []
        for (dtype, device), group in groups.items():
            sent = [*([] if sums else numbers), *(float(parameter.grad is not None) for parameter in group)]
            slots = self._slots(sent).to(self._joined.device, dtype)
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            message = torch.cat([slots, *(part.flatten().to(self._joined.device) for part in own)])
            answer, *totals = self._sum(message).split([len(slots), *(part.numel() for part in own)])
            arrived = self._in_slots(answer)
            for parameter, total, holders in zip(group, totals, arrived[-len(group) :], strict=True):
                parameter.grad = total.to(device).view_as(parameter) if holders else None
            sums += arrived[: -len(group)]
        return sums

    def _slots(self, values: Sequence[float]) -> Tensor:
        """A place for each process's values, this one's filled; 16 bits each, which every dtype of masters can hold."""
        slots = torch.zeros(self.count, len(values), dtype=torch.float64)
        slots[self.index] = torch.tensor(values, dtype=torch.float64)
        return slots.view(torch.int16).flatten()

    def _in_slots(self, slots: Tensor) -> list[float]:
        """Sums over all processes of what they put there."""
        return slots.to("cpu", torch.int16).view(torch.float64).view(self.count, -1).sum(0).tolist()

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import reduce

        try:
            return reduce(tensor, reduction="sum")
        except RuntimeError as error:  # of the backend, whose kinds differ
            raise ConnectionError(f"another process of this run has ended ({str(error).splitlines()[0]})") from error


@functools.cache
def processes() -> Processes:
    """Those that this one was started with.

    Raises:
        ImportError: several, and the [train] extra is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError("several processes need accelerate: pip install 'recmas-kernels[train]'") from None
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return Processes(PartialState(cpu=on_cpu, timeout=PATIENCE))
