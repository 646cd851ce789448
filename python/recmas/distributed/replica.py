"""`Replica`: one process of an agent, and the thread here that gives it orders; one that is lost is started again."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    ObjectFetchTimedOutError,
    ObjectLostError,
    OwnerDiedError,
    RayError,
    RaySystemError,
    RayTaskError,
)

from recmas.config.system_json import SystemSpec
from recmas.distributed.order import Described, Done, Loading, Order
from recmas.distributed.sealed import RefusedError
from recmas.scheduling.executor import Ended, Failed, Report, Wrote
from recmas.scheduling.task import Task

STARTS = 3
"""Processes that may end, one after the other, before one of them has loaded its agent."""
CONTROL = "control"
"""Calls of this group run beside the work of a process."""
WATCH = "watch"
"""So does the one call of this group, which ends with the process."""
AHEAD = 8
"""Pieces of a text that a process may be ahead of who reads them."""
LOOK = 0.1
"""Seconds between two looks at what else has happened while a process works."""
IDLE = 1.0
"""Seconds between two looks at whether a process that has nothing to do is still there."""
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

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of its rows."""
        return tuple(part.number for part in self.task.parts)


class Told(NamedTuple):
    """A job, and Ray's references to what the process makes of it: a stream, or a report and a message.

    None while no process has been told, and an error where it could not be.
    """

    job: Job
    made: Any


class Vanished(NamedTuple):
    """A process has ended while it had nothing to do."""


class Replica:
    """One process of an agent.

    A process is told of a job as soon as there is one: Ray lets jobs wait there, one after the other, so that the next
    one begins without a word from here.

    Args:
        role: the agent.
        launch: starts a process; Ray's handle of it.
        loading: what `AgentProcess.load` takes.
        pace: seconds between two reports of a text that grows; None reports texts at their end.
        refused: told of every message that was refused.

    Attributes:
        jobs: that it was given and that have not ended.
        open: it works, neither starting nor broken.
        described: its agent, loaded for the last time; there once it has been open.
        rows: of its latest jobs: it may hold their prefixes.
        broken: why it is not started any more.
        restarts: how often it was.
        lost: jobs that are to be repeated.
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
        self.open, self.restarts, self.lost = False, 0, 0
        self.rows: deque[tuple[int, ...]] = deque(maxlen=loading[0].held)
        self.broken: Exception | None = None
        self.described: Described
        self._told: deque[Told] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._process: Any = None
        self._begun: Future[Described] = Future()
        self._thread = threading.Thread(target=self._work, name=f"recmas {role}", daemon=True)

    @property
    def jobs(self) -> int:
        return len(self._told)

    @property
    def at_work(self) -> Job | None:
        """The job that it works on; None without one."""
        with self._changed:
            return self._told[0].job if self._told else None

    def load(self) -> None:
        """Start the process and load the agent there, beside whatever else happens here."""
        self._thread.start()

    def begin(self) -> Described:
        """Wait until the agent is loaded.

        Raises:
            ValueError: it cannot be loaded.
        """
        return self._begun.result()

    def give(self, job: Job) -> None:
        """Do a job; one after the other."""
        self.rows.append(job.rows)
        with self._changed:
            self._told.append(self._tell(job) if self.open else Told(job, None))
            self._changed.notify()

    def close(self) -> None:
        """End the process; a job that is under way is not reported any more."""
        self._closing = True
        self._end()
        with self._changed:
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            self._start()
            self.described = self._ready()
            self._open()
            self._begun.set_result(self.described)
        except Exception as error:  # of whatever kind: it is told to whoever waits in `begin`
            self._begun.set_exception(error)
        while (told := self._next()) is not None:
            if isinstance(told, Vanished):
                self._start_again()
                continue
            broken = self.broken
            last = self._done(told) if broken is None else Failed(told.job.task, broken, lost=True)
            if self._closing:
                break
            gone = broken is None and isinstance(last, Failed) and last.lost and not last.inputs
            ended = [(told.job, last), *(self._lost() if gone else ())]
            with self._changed:
                self._told.popleft()
            for job, report in ended:
                self.lost += isinstance(report, Failed) and report.lost
                job.report(report)
            if gone:
                self._start_again()
        self._end()

    def _next(self) -> Told | Vanished | None:
        """The first job that has not ended, when there is one; or that the process is gone; None at the end."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._told or self._closing, IDLE):
                if self.open and ray.wait([self._watched], timeout=0)[0]:
                    self.open = False
                    return Vanished()
            return None if self._closing else self._told[0]

    def _lost(self) -> list[tuple[Job, Failed]]:
        """The jobs behind the one with which the process was lost: others may do them meanwhile."""
        with self._changed:
            self.open = False
            behind = [self._told.pop().job for _ in range(len(self._told) - 1)]
        return [(job, Failed(job.task, self._gone(), lost=True, begun=False)) for job in reversed(behind)]

    def _open(self) -> None:
        """The process works: tell it of the jobs that have waited for it."""
        with self._changed:
            waiting = [told.job for told in self._told]
            self._told.clear()
            self._told.extend(map(self._tell, waiting))
            self.open = True

    def _tell(self, job: Job) -> Told:
        try:
            if job.task.work.final and self._pace is not None:
                stream = self._process.stream.options(
                    num_returns="streaming", _generator_backpressure_num_objects=AHEAD
                )
                return Told(job, stream.remote(job.order, self._pace, *job.messages))
            return Told(job, self._process.run.options(num_returns=2).remote(job.order, *job.messages))
        except Exception as error:  # of whatever kind: it is the rows' answer
            return Told(job, error)

    def _done(self, told: Told) -> Ended | Failed:
        """The last report of a job."""
        job, made = told
        task = job.task
        try:
            if isinstance(made, Exception):
                raise made
            if task.work.final and self._pace is not None:
                account = None
                for done in self._streamed(job, made):
                    account = done.account
                    job.report(Wrote(task, done.grown))
                assert account is not None
                return Ended(task, None, account)
            report, message = made
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

    def _streamed(self, job: Job, stream: Any) -> Iterator[Done]:
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
            return Failed(task, self._gone(), lost=True)
        return Failed(task, cause if isinstance(cause, Exception) else error)

    def _gone(self) -> ConnectionError:
        return ConnectionError(f"the process of agent {self.role!r} has ended")

    def _start(self) -> None:
        self._process = self._launch()
        if self._closing:  # since the one before was ended
            self._end()
        self._placed = self._process.__ray_ready__.remote()
        self._watched = self._process.watch.options(concurrency_group=WATCH).remote()
        self._loaded = self._process.load.remote(*self._loading)

    def _replace(self) -> None:
        self.restarts += 1
        self._end()
        self._start()

    def _start_again(self) -> None:
        try:
            self._replace()
            described = self._ready()
            if described.digest != self.described.digest:
                raise ValueError(f"agent {self.role!r}: its files have changed since it was first loaded")
            self.described = described
            self._open()
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
            except RaySystemError as error:  # the process works, and what it says of itself cannot be read
                said = " ".join(str(error.client_exc).split())[:200]
                raise ValueError(
                    f"agent {self.role!r}: what it has loaded cannot be read by this process: {said}; does its "
                    "tokenizer need code of its own (--trust-remote-code)? --engine ray cannot send that"
                ) from error
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
