"""Which rows are answered together: so many at once, or as many as memory holds.

Rows go from short to long, so that little of a batch is padding and long rows come in smaller batches. A row's result
depends on none of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from recmas import chats
from recmas.lengths import lengths_of
from recmas.memory import SAFETY
from recmas.memory.free import free_bytes
from recmas.memory.rows import Length, longest, row_bytes
from recmas.memory.shape import shape_of

if TYPE_CHECKING:
    from recmas.running import Plan

BATCH_SIZE = 32
LARGEST = 256
"""Rows at once where memory decides: beyond that, batches only take longer."""
Fields = Mapping[str, object]


class Batches:
    """Row numbers, batch by batch.

    Args:
        order: all row numbers, as they are to be answered.
        largest: most rows at once.
        fitting: how many of the rows it is given, from the first on, memory holds at once; None counts none.
    """

    def __init__(
        self, order: Sequence[int], largest: int, fitting: Callable[[Sequence[int]], int] | None = None
    ) -> None:
        self._left, self._largest, self._fitting = list(order), largest, fitting
        self._now: list[int] = []
        self._warned = False

    def __iter__(self) -> Iterator[list[int]]:
        while self._left:
            self._now = self._left[: self._largest]
            if self._fitting is not None:
                self._now = self._now[: max(1, self._fitting(self._now))]
            taken, self._left = self._left, self._left[len(self._now) :]
            yield self._now
            if len(self._now) > self._largest:  # it has been halved: once more, from the same row on
                self._left = taken

    def halve(self) -> bool:
        """Memory ran out: take at most half as many rows from now on, those of the last batch first.

        False where that cannot help: a single row, or a number of rows that was asked for.
        """
        if self._fitting is None or len(self._now) == 1:
            return False
        self._largest = len(self._now) // 2
        if not self._warned:
            warnings.warn(f"out of memory with {len(self._now)} rows at once; going on with fewer", stacklevel=2)
            self._warned = True
        return True


def batches(plan: Plan, rows: Sequence[Fields], batch_size: int | str | None) -> Batches:
    """The batches of a run.

    Args:
        plan: the run.
        rows: fields of all rows.
        batch_size: rows at once; "auto" takes as many as memory holds; None is 32.

    Raises:
        ValueError: another text, or a number below 1.
    """
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size: {batch_size!r} is neither a number nor 'auto'")
        return _by_memory(plan, rows)
    size = BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size: {size} is not positive")
    order = list(range(len(rows)))
    if size > 1:
        order.sort(key=lambda index: chats.length(rows[index]))
    return Batches(order, size)


def _by_memory(plan: Plan, rows: Sequence[Fields]) -> Batches:
    mas = plan.mas
    lengths = [lengths_of(plan, row) for row in rows]
    shapes = {
        role: shape_of(agent.model.config, torch.empty(0, dtype=agent.dtype).element_size())
        for role, agent in mas.agents.items()
    }

    def fitting(numbers: Sequence[int]) -> int:
        """What is free is all for the batch, but for weights that an agent will bring with it."""
        free = {device: free_bytes(device) for device in dict.fromkeys(mas.devices.values())}
        come = {device: 0 if mas.lender is None else mas.lender.to_come(device) for device in free}
        budget = {device: SAFETY * (count - come[device]) for device, count in free.items() if count is not None}
        most: dict[str, Length] = {}
        for count, number in enumerate(numbers, start=1):
            most = longest([most, lengths[number]])
            each = row_bytes(shapes, mas.devices, most, plan.rounds)
            if any(count * each[device] > room for device, room in budget.items()):
                return count - 1
            if count == BATCH_SIZE and len(budget) < len(free):  # a device that does not tell what is free
                return count
        return len(numbers)

    order = sorted(range(len(rows)), key=lambda index: max(length.prompt for length in lengths[index].values()))
    return Batches(order, LARGEST, fitting)
