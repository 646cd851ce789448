"""`Turns`: which processes are given jobs when their machine has fewer cores than they would take all together."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial

from recmas.distributed.replica import Job, Replica
from recmas.scheduling.executor import Ended, Failed, Report, Wrote


class Turns:
    """Gives jobs to replicas: on every machine as many as it has cores for, what is furthest on its walk first.

    Processes that are more than the cores would share them evenly, so the agent that all others wait for would be as
    slow as they. A job waits for those that are as far as itself or further, not for others, which will soon be done.
    Rows by themselves, with nothing else at work or waiting, have the cores to share among the agents of their stage:
    the last of these ends sooner.

    Args:
        replicas: by role, all of them.
        ahead: jobs that wait at a process while it works.
    """

    def __init__(self, replicas: Mapping[str, Sequence[Replica]], ahead: int) -> None:
        self._replicas, self._ahead = replicas, ahead
        self._waiting: list[Job] = []
        self._lock = threading.Lock()

    def add(self, job: Job) -> None:
        """Give a job to a replica, as soon as it is its turn."""
        with self._lock:
            self._waiting.append(job._replace(report=partial(self._tell, job.report)))
        self._give()

    def close(self) -> None:
        """What waits is not given to anybody any more."""
        with self._lock:
            self._waiting.clear()

    def _tell(self, report: Report, what: Wrote | Ended | Failed) -> None:
        """Pass on what became of a job; at its end another one gets its cores first of all."""
        if not isinstance(what, Wrote):
            self._give()
        report(what)

    def _give(self) -> None:
        short: set[str] = set()  # machines with a job that waits for cores: no other one takes these meanwhile
        with self._lock:
            for job in sorted(self._waiting, key=_urgency):
                replica = self._choose(job)
                if replica.broken is None and replica.jobs > self._ahead:
                    continue
                if _computes(replica):
                    machine = replica.described.machine
                    if machine in short or not self._has_cores(replica, job):
                        short.add(machine)
                        continue
                self._waiting.remove(job)
                replica.give(job)

    def _choose(self, job: Job) -> Replica:
        """Of the replicas that work and have the fewest jobs, one that has had these rows."""
        replicas = self._replicas[job.task.work.role]
        return min(replicas, key=lambda one: (one.broken is not None, not one.open, one.jobs, job.rows not in one.rows))

    def _has_cores(self, replica: Replica, job: Job) -> bool:
        """Whether the machine of a replica has cores for the job."""
        here, everybody = replica.described, [one for replicas in self._replicas.values() for one in replicas]
        beside = [one for one in everybody if _computes(one) and one.described.machine == here.machine]
        busy = {one: at_work for one in beside if (at_work := one.at_work) is not None}
        if {one.rows for one in (*busy.values(), *self._waiting)} == {job.rows}:
            return True
        before = {one for one, at_work in busy.items() if _place(at_work) >= _place(job)} | {replica}
        return len(before) == 1 or sum(one.described.threads for one in before) <= here.cores


def _place(job: Job) -> tuple[int, int]:
    """How far the one of its rows that is furthest is on its walk."""
    return max((part.visit.round, part.visit.stage) for part in job.task.parts)


def _computes(replica: Replica) -> bool:
    """Whether its jobs take cores now: it works, and on the processor."""
    return replica.open and replica.described.threads > 0


def _urgency(job: Job) -> tuple[int, int, int]:
    """Sorts jobs: those that are furthest, then those that came first."""
    round, stage = _place(job)
    return -round, -stage, job.order.task.number
