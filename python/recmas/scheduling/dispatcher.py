"""`Dispatcher`: puts rows that wait for the same work into batches, and keeps the agents busy with them.

One thread decides everything; all others leave it notes. A row that enters waits a little, for others to share its
batch; after that it waits at no stage for rows that might come, only for an agent that is busy. Whoever then waits for
the same work goes along, in whichever round: rows join at the boundaries of stages, and each ends by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from recmas.config.pattern import Visit
from recmas.scheduling.executor import Ended, Executor, Failed, Wrote
from recmas.scheduling.row import Row
from recmas.scheduling.task import Piece, Task, Took, Work

LOSSES = 2
"""Batches that a row may lose before it goes by itself: it may be what ends the processes."""
LOSSES_ALONE = 6
"""Batches that it may lose in all before it is given up."""
TURNS = 20
"""Times that it may begin its walk before it is given up: its messages may be what is refused."""


@dataclass(frozen=True)
class Limits:
    """How rows share batches.

    Attributes:
        window: seconds that a row waits for others when it enters.
        rows: most rows in a batch.
        tokens: most positions in a batch, prompts and what is added to them; a longer row goes alone. So many end the
            wait, too.
    """

    window: float = 0.005
    rows: int = 64
    tokens: int = 65536


@dataclass
class _UnderWay:
    """A task, its rows, and on which turn of its walk each of them was."""

    task: Task
    rows: list[Row]
    turns: list[int]

    def wanted(self) -> list[tuple[int, Row]]:
        """The rows that still wait for this task, by their places in the batch."""
        rows = zip(self.rows, self.turns, strict=True)
        return [(place, row) for place, (row, turn) in enumerate(rows) if not row.over and row.turn == turn]


class Dispatcher:
    """Takes rows through a system.

    Args:
        executor: runs the agents; the dispatcher closes it.
        limits: of batches.
        on_batch: told of every batch that has ended: its work, its rows and its seconds.

    Attributes:
        broken: why nothing is dispatched any more; None while it is.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits = Limits(),
        on_batch: Callable[[Work, int, float], object] = lambda work, rows, seconds: None,
    ) -> None:
        self.executor, self.limits, self._on_batch = executor, limits, on_batch
        self._notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._rows: dict[int, Row] = {}
        self._waiting: OrderedDict[tuple[int, Visit], tuple[Row, Work]] = OrderedDict()
        self._under_way: dict[int, _UnderWay] = {}
        self._lanes = executor.lanes
        self._numbers, self._arrivals = itertools.count(), itertools.count()
        self._closing = False
        self.broken: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="recmas dispatcher", daemon=True)
        self._thread.start()

    def add(self, *rows: Row) -> None:
        """Take rows through the system; those of one call share their first batch, as far as its bounds allow."""

        def add() -> None:
            for row in rows:
                self._add(row)

        self._notes.put(add)

    def drop(self, row: Row, error: Exception) -> None:
        """Nobody waits for this row any more: it fails with `error`, and its place is free."""
        self._notes.put(lambda: self._drop(row, error))

    def close(self) -> None:
        """End; rows that are under way fail."""
        self._notes.put(self._close)
        self._thread.join()
        self.executor.close()

    def _loop(self) -> None:
        try:
            patience = None
            while not self._closing:
                with contextlib.suppress(queue.Empty):
                    self._notes.get(timeout=patience)()
                    while True:
                        self._notes.get_nowait()()
                now = time.monotonic()  # one for all: a window that ends between two readings would end unseen
                self._expire(now)
                self._start(now)
                patience = self._patience(now)
        except Exception as error:  # a mistake of this module: whoever waits is told, and whoever comes
            self.broken = error
            for row in list(self._rows.values()):
                self._drop(row, error)
            while not self._closing:
                self._notes.get()()

    def _patience(self, now: float) -> float | None:
        """Seconds until the first window or deadline that had not ended `now`."""
        ends = [row.deadline for row in self._rows.values() if row.deadline is not None]
        windows = (row.since + self.limits.window for row, _ in self._waiting.values() if row.entering)
        ends += [end for end in windows if end > now]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _add(self, row: Row) -> None:
        if self.broken is not None:
            row.fail(self.broken)
            return
        row.since, row.arrival = time.monotonic(), next(self._arrivals)
        self._rows[row.number] = row
        self._wait(row)

    def _wait(self, row: Row) -> None:
        """Let a row wait for all that it can begin now."""
        for visit, work in row.due():
            self._waiting.setdefault((row.number, visit), (row, work))

    def _drop(self, row: Row, error: Exception) -> None:
        self._rows.pop(row.number, None)
        for key in [key for key in self._waiting if key[0] == row.number]:
            del self._waiting[key]
        for under_way in self._under_way.values():
            if row in under_way.rows:
                under_way.task.dropped.add(under_way.rows.index(row))
        row.fail(error)

    def _expire(self, now: float) -> None:
        for row in [row for row in self._rows.values() if row.deadline is not None and row.deadline <= now]:
            self._drop(row, TimeoutError("the time for this request is over"))

    def _close(self) -> None:
        self._closing = True
        for row in list(self._rows.values()):
            self._drop(row, RuntimeError("the system is shut down"))

    def _start(self, now: float) -> None:
        """Start all that can be started: what holds the row that came first goes first."""
        for key, (row, work) in sorted(self._waiting.items(), key=_arrival):
            if key not in self._waiting or not self._free(work.role):
                continue
            batch = self._batch(row, work)
            full = len(batch) == self.limits.rows or sum(other.tokens for _, other in batch) >= self.limits.tokens
            if full or any(not other.entering or now >= other.since + self.limits.window for _, other in batch):
                self._begin(batch, work)

    def _free(self, role: str) -> bool:
        """Whether this agent can take a task."""
        lane = self._lanes[role]
        return lane.tasks > sum(self._lanes[held.task.work.role].key == lane.key for held in self._under_way.values())

    def _batch(self, first: Row, work: Work) -> list[tuple[Visit, Row]]:
        """The rows that may share a batch with `first`, itself included."""
        batch: list[tuple[Visit, Row]] = []
        tokens, taken = 0, set[int]()
        for (number, visit), (row, wanted) in sorted(self._waiting.items(), key=_arrival):
            if number in taken or wanted != work or row.alone != first.alone:
                continue
            if batch and (len(batch) == self.limits.rows or tokens + row.tokens > self.limits.tokens):
                break
            batch.append((visit, row))
            taken.add(number)
            tokens += row.tokens
        return batch

    def _begin(self, batch: list[tuple[Visit, Row]], work: Work) -> None:
        parts, read = [], []
        for visit, row in batch:
            del self._waiting[row.number, visit]
            part, messages = row.begin(visit)
            parts.append(part)
            read.append(messages)
        senders = dict.fromkeys(sender for messages in read for sender in messages)
        sent: dict[str, list[Piece | None]] = {
            sender: [messages.get(sender) for messages in read] for sender in senders
        }
        task = Task(next(self._numbers), work, parts, sent)
        rows = [row for _, row in batch]
        self._under_way[task.number] = _UnderWay(task, rows, [row.turn for row in rows])
        self.executor.start(task, lambda report: self._notes.put(lambda: self._told(report)))

    def _told(self, report: Wrote | Ended | Failed) -> None:
        task, under_way = report.task, self._under_way[report.task.number]
        if isinstance(report, Wrote):
            for place, row in under_way.wanted():
                if (grown := report.grown.get(place)) is not None:
                    self._to(row, partial(Row.grow, grown=grown))
                    if grown.took is not None:
                        self._end(under_way, place, row, grown.took)
            return
        del self._under_way[task.number]
        if isinstance(report, Failed):
            self._failed(report, under_way.wanted())
            return
        self._on_batch(task.work, len(under_way.rows), report.account.seconds)
        for place, row in under_way.wanted():
            self._end(under_way, place, row, report.account.of(place), report.message)

    def _end(self, under_way: _UnderWay, place: int, row: Row, took: Took, message: object = None) -> None:
        visit = under_way.task.parts[place].visit
        piece = Piece(message, place)
        self._to(row, partial(Row.end, visit=visit, rows=len(under_way.rows), piece=piece, took=took))

    def _to(self, row: Row, step: Callable[[Row], None]) -> None:
        """Tell a row something; what goes wrong there is that row's own."""
        if row.over:
            return
        try:
            step(row)
        except Exception as error:
            self._drop(row, error)
            return
        if row.over:
            self._rows.pop(row.number, None)
        else:
            self._wait(row)

    def _failed(self, report: Failed, rows: list[tuple[int, Row]]) -> None:
        """Repeat what was lost; find the row that makes a batch fail, and let the others go on without it."""
        names = [next(self._numbers) + 1 for _ in range(2)]
        for index, (place, row) in enumerate(rows):
            row.losses += report.lost and report.begun
            often = row.turn >= TURNS if report.inputs else row.losses >= LOSSES_ALONE
            if len(rows) == 1 and (not report.lost or often):
                self._drop(row, report.error)
                return
            if not report.lost or row.losses >= LOSSES:
                row.alone = names[2 * index >= len(rows)]
            if report.inputs:
                self._forget(row)
                row.begin_again()
                self._wait(row)
            else:
                self._waiting[row.number, report.task.parts[place].visit] = row, report.task.work

    def _forget(self, row: Row) -> None:
        """What a row that begins again was waiting for."""
        for key in [key for key in self._waiting if key[0] == row.number]:
            del self._waiting[key]


def _arrival(item: tuple[tuple[int, Visit], tuple[Row, Work]]) -> tuple[int, Visit]:
    """Sorts what waits: rows that came first go first."""
    (_, visit), (row, _) = item
    return row.arrival, visit
