"""Which rows are answered together: so many at once, or as many as memory holds.

Rows go from short to long, so that little of a batch is padding and long rows come in smaller batches. A row's result
depends on none of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from recmas.answering.plan import Plan
from recmas.answering.prompt_lengths import lengths_of
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.prompts.rows import Fields, length
from recmas.sizing import BATCH_SIZE, SAFETY
from recmas.sizing.free_memory import free_bytes
from recmas.sizing.kept_bytes import kept_bytes
from recmas.sizing.model_bytes import model_bytes
from recmas.sizing.row_bytes import Length, longest, row_bytes

LARGEST = 256
"""Rows at once where memory decides: beyond that, batches only take longer."""


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


def batches(plan: Plan, rows: Sequence[Fields], constants: ConstantPrefixes | None = None) -> Batches:
    """The batches of a run: `plan.options.batch_size` rows at once, or as many as memory holds.

    Args:
        plan: the run.
        rows: all of them.
        constants: what outlives its batches; None where nothing does.
    """
    size = plan.options.batch_size
    if not isinstance(size, int):
        return _by_memory(plan, rows, constants)
    order = list(range(len(rows)))
    if size > 1:
        order.sort(key=lambda index: length(rows[index]))
    return Batches(order, size)


def _by_memory(plan: Plan, rows: Sequence[Fields], constants: ConstantPrefixes | None) -> Batches:
    system = plan.system
    lengths = [lengths_of(plan, row) for row in rows]
    shapes = {
        role: model_bytes(agent.model.config, torch.empty(0, dtype=agent.dtype).element_size())
        for role, agent in system.agents.items()
    }

    def fitting(numbers: Sequence[int]) -> int:
        """All that is free is for the batch, but for weights that offload will copy there, and what will be kept."""
        free = {device: free_bytes(device) for device in dict.fromkeys(system.devices.values())}
        offloader = system.offloader
        kept = kept_bytes(shapes, system.devices, {} if constants is None else _unread(plan, constants))
        come = {device: 0 if offloader is None else offloader.bytes_to_load(device) for device in free}
        more = {device: come[device] + kept[device] for device in free}
        budget = {device: SAFETY * (count - more[device]) for device, count in free.items() if count is not None}
        most: dict[str, Length] = {}
        for count, number in enumerate(numbers, start=1):
            most = longest([most, lengths[number]])
            each = row_bytes(shapes, system.devices, most, plan.rounds)
            if any(count * each[device] > room for device, room in budget.items()):
                return count - 1
            if count == BATCH_SIZE and len(budget) < len(free):  # a device that does not report what is free
                return count
        return len(numbers)

    order = sorted(range(len(rows)), key=lambda index: max(length.prompt for length in lengths[index].values()))
    return Batches(order, LARGEST, fitting)


def _unread(plan: Plan, constants: ConstantPrefixes) -> dict[str, list[int]]:
    """By role, positions of what its prompts begin with in all batches, where none has read it yet."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for visit in plan.system.pattern.visits(min(plan.rounds, 2)):
        found.setdefault(visit.role, set()).add(tuple(plan.system.constant_ids(visit)))
    agents = plan.system.agents
    return {
        role: [len(ids) for ids in each if not constants.have(agents[role].decoder, ids)]
        for role, each in found.items()
    }
