"""`Replica`: one process of an agent, and the thread here that gives it orders; one that is lost is started again."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectFetchTimedOutError, ObjectLostError, OwnerDiedError, RayError, RayTaskError

from recmas.config.system_json import SystemSpec
from recmas.distributed.order import Described, Done, Loading, Order
from recmas.distributed.sealed import RefusedError
from recmas.scheduling.executor import Ended, Failed, Report, Wrote
from recmas.scheduling.task import Task

STARTS = 3
"""Processes that may end, one after the other, before one of them has loaded its agent."""
CONTROL = "control"
"""Calls of this group run beside the work of a process."""
AHEAD = 8
"""Pieces of a text that a process may be ahead of who reads them."""
LOOK = 0.1
"""Seconds between two looks at what else has happened while a process works."""
RETURN = 300.0
"""Seconds that a process may wait for a machine: for the one that was lost, or for another with as much."""


class Sent(NamedTuple):
    """A message that lies in the cluster, and what it says of itself."""

    ref: Any
    stamp: Any


class Job(NamedTuple):
    """A task under way: what the process is told, the messages it reads, and who is told what becomes of it."""

    task: Task
    order: Order
    messages: tuple[Any, ...]
    report: Report


class Replica:
    """One process of an agent.

    Args:
        role: the agent.
        launch: starts a process; Ray's handle of it.
        loading: what `AgentProcess.load` takes.
        pace: seconds between two reports of a text that grows; None reports texts at their end.
        refused: told of every message that was refused.

    Attributes:
        busy: it has a job, or is started again.
        rows: of its latest job: it may hold their prefixes.
        broken: why it is not started any more.
        restarts: how often it was.
    """

    def __init__(
        self,
        role: str,
        launch: Callable[[], Any],
        loading: tuple[Loading, SystemSpec, str, str, bytes],
        pace: float | None,
        refused: Callable[[RefusedError], object],
    ) -> None:
        self.role, self._launch, self._loading = role, launch, loading
        self._pace, self._refused = pace, refused
        self.busy, self.restarts = False, 0
        self.rows: tuple[int, ...] = ()
        self.broken: Exception | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = False
        self._process: Any = None
        self._begun: Future[Described] = Future()
        self._thread = threading.Thread(target=self._work, name=f"recmas {role}", daemon=True)
        self._thread.start()

    def begin(self) -> Described:
        """Wait until the agent is loaded.

        Raises:
            ValueError: it cannot be loaded.
        """
        return self._begun.result()

    def give(self, job: Job) -> None:
        """Do a job; one after the other."""
        self.busy = True
        self.rows = tuple(part.number for part in job.task.parts)
        self._jobs.put(job)

    def close(self) -> None:
        """End the process; a job that is under way is not reported any more."""
        self._closing = True
        self._end()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._start()
            self._begun.set_result(self._ready())
        except Exception as error:  # of whatever kind: it is told to whoever waits in `begin`
            self._begun.set_exception(error)
        while (job := self._jobs.get()) is not None and not self._closing:
            broken = self.broken
            last = self._done(job) if broken is None else Failed(job.task, broken, lost=True)
            if self._closing:
                break
            gone = broken is None and isinstance(last, Failed) and last.lost and not last.inputs
            self.busy = gone
            job.report(last)
            if gone:
                self._start_again()
                self.busy = not self._jobs.empty()
        self._end()

    def _done(self, job: Job) -> Ended | Failed:
        """The last report of a job."""
        task = job.task
        try:
            if task.work.final and self._pace is not None:
                account = None
                for done in self._streamed(job, self._pace):
                    account = done.account
                    job.report(Wrote(task, done.grown))
                assert account is not None
                return Ended(task, None, account)
            report, message = self._process.run.options(num_returns=2).remote(job.order, *job.messages)
            try:
                done = ray.get(report)
            except RayError:
                with contextlib.suppress(RayError):  # the same: Ray prints errors that nobody has looked at
                    ray.get(message)
                raise
            if task.work.final:
                job.report(Wrote(task, done.grown))
            return Ended(task, Sent(message, job.order.stamp), done.account)
        except Exception as error:  # of whatever kind: it is the rows' answer
            return self._failed(task, error)

    def _streamed(self, job: Job, pace: float) -> Iterator[Done]:
        process = self._process.stream.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        stream = process.remote(job.order, pace, *job.messages)
        told: set[int] = set()
        while True:
            while not ray.wait([stream], timeout=LOOK)[0]:
                told |= self._drop(job, told)
            told |= self._drop(job, told)
            try:
                part = next(stream)
            except StopIteration:
                return
            yield ray.get(part)

    def _drop(self, job: Job, told: set[int]) -> set[int]:
        """Tell the process of rows that were dropped since; these rows."""
        if new := set(job.task.dropped) - told:
            self._process.drop.options(concurrency_group=CONTROL).remote(job.order.task.number, new)
        return new

    def _failed(self, task: Task, error: Exception) -> Failed:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RefusedError):
            self._refused(cause)
            return Failed(task, cause, lost=True, inputs=True)
        if isinstance(cause, ObjectLostError | OwnerDiedError | ObjectFetchTimedOutError):
            return Failed(task, ConnectionError(f"a message for {self.role!r} was lost"), lost=True, inputs=True)
        if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
            gone = ConnectionError(f"the process of agent {self.role!r} has ended")
            return Failed(task, gone, lost=True)
        return Failed(task, cause if isinstance(cause, Exception) else error)

    def _start(self) -> None:
        self._process = self._launch()
        if self._closing:  # since the one before was ended
            self._end()
        self._placed = self._process.__ray_ready__.remote()
        self._loaded = self._process.load.remote(*self._loading)

    def _replace(self) -> None:
        self.restarts += 1
        self._end()
        self._start()

    def _start_again(self) -> None:
        try:
            self._replace()
            if self._ready().digest != self.begin().digest:
                raise ValueError(f"agent {self.role!r}: its files have changed since it was first loaded")
        except Exception as error:
            self.broken = error
            self._end()

    def _ready(self) -> Described:
        for left in reversed(range(STARTS)):
            try:
                if not ray.wait([self._placed], timeout=RETURN)[0]:
                    raise ValueError(
                        f"agent {self.role!r}: no machine of the cluster has had room for its process in {RETURN:.0f} s"
                    )
                described: Described = ray.get(self._loaded)
                return described
            except RayTaskError as error:
                if isinstance(error.cause, MemoryError):
                    break
                raise error.cause if isinstance(error.cause, Exception) else error  # noqa: B904
            except RayError:
                if self._closing or not left:
                    break
                self._replace()
        raise ValueError(f"agent {self.role!r}: its process ended before it had loaded; is there enough memory?")

    def _end(self) -> None:
        if self._process is not None:
            end_process(self._process)


def end_process(process: Any) -> None:
    """End a process, whatever it does."""
    ray.kill(process)
