"""Whose turn it is at the cores of a machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from recmas import MIXTURE
from recmas.config.pattern import Visit
from recmas.scheduling.executor import Ended, Failed, Wrote
from recmas.scheduling.task import Account, Part, Task, Work

pytest.importorskip("ray", reason="ray is not installed")

from recmas.distributed.replica import Job
from recmas.distributed.turns import Turns

MATH, CODE, SCIENCE, SUMMARIZER = MIXTURE.roles
VISITS = {visit.role: visit for visit in MIXTURE.visits(1)}


class Process:
    """A replica on a machine of two cores, as `Turns` sees it."""

    def __init__(self, role: str, log: list[str], threads: int = 1, machine: str = "here") -> None:
        self.role, self.log = role, log
        self.described = SimpleNamespace(machine=machine, cores=2, threads=threads)
        self.open, self.broken, self.rows = True, None, list[tuple[int, ...]]()
        self.given: list[Job] = []

    @property
    def jobs(self) -> int:
        return len(self.given)

    @property
    def at_work(self) -> Job | None:
        return self.given[0] if self.given else None

    def give(self, job: Job) -> None:
        self.given.append(job)
        self.log.append(f"{self.role} {job.rows[0]}")

    def end(self, what: Any = Ended) -> None:
        job = self.given.pop(0)
        job.report(Failed(job.task, ValueError("x")) if what is Failed else Ended(job.task, None, Account()))


class Machine:
    """One process of each role of a mixture."""

    def __init__(self, ahead: int = 1, **threads: int) -> None:
        self.log: list[str] = []
        self.told: list[Any] = []
        self.processes = {role: Process(role, self.log, threads.get(role, 1)) for role in MIXTURE.roles}
        replicas: Any = {role: [process] for role, process in self.processes.items()}
        self.turns = Turns(replicas, ahead)
        self._numbers = 0

    def add(self, role: str, row: int, *visits: Visit) -> None:
        """A job of one row, or of one for each visit."""
        self._numbers += 1
        parts = [Part(row + place, visit, {}) for place, visit in enumerate(visits or [VISITS[role]])]
        task = Task(self._numbers, Work(role, "latent"), parts, {})
        order: Any = SimpleNamespace(task=task)
        self.turns.add(Job(task, order, (), self.told.append))

    def since(self) -> list[str]:
        """What was given since the last call."""
        found = list(self.log)
        self.log.clear()
        return found


def test_agents_of_one_stage_share_the_cores_while_nothing_else_waits() -> None:
    machine = Machine()
    for row in (0, 1, 2):
        for role in (MATH, CODE, SCIENCE):
            machine.add(role, row)
    assert machine.since() == ["math 0", "code 0", "science 0"]
    machine.processes[MATH].end()
    assert machine.since() == []  # two others are at work
    machine.processes[CODE].end()
    assert machine.since() == ["math 1"]
    machine.processes[SCIENCE].end()
    machine.add(SUMMARIZER, 0)
    assert machine.since() == ["code 1", "summarizer 0"]  # it does not wait for the experts, but they for it
    machine.processes[MATH].end()
    assert machine.since() == []
    machine.processes[CODE].end()
    assert machine.since() == ["science 1"]
    machine.processes[SUMMARIZER].end()
    assert machine.since() == ["math 2"]


def test_what_is_furthest_goes_first_and_others_wait_for_a_core() -> None:
    machine = Machine()
    machine.add(MATH, 1)
    machine.add(SUMMARIZER, 0)
    assert machine.since() == ["math 1", "summarizer 0"]
    machine.add(CODE, 1)
    machine.add(SCIENCE, 1)
    machine.add(MATH, 2)
    assert machine.since() == []  # nor is math told ahead, while code waits for a core
    machine.processes[MATH].end()
    assert machine.since() == ["code 1"]
    machine.processes[CODE].end(Failed)
    assert machine.since() == ["science 1"]
    machine.add(SUMMARIZER, 1)
    assert machine.since() == ["summarizer 1"]  # it goes on with its own core
    machine.processes[SCIENCE].end()
    assert machine.since() == ["math 2"]
    assert [type(what) for what in machine.told] == [Ended, Failed, Ended]


def test_a_text_that_grows_gives_no_core_away() -> None:
    machine = Machine()
    machine.add(MATH, 1)
    machine.add(SUMMARIZER, 0)
    machine.add(CODE, 1)
    job = machine.processes[SUMMARIZER].given[0]
    job.report(Wrote(job.task, {}))
    assert machine.since() == ["math 1", "summarizer 0"]
    assert [type(what) for what in machine.told] == [Wrote]


def test_an_agent_with_many_threads_waits_for_all_its_cores_and_is_not_passed() -> None:
    machine = Machine(code=2)
    machine.add(MATH, 0)
    machine.add(CODE, 1)
    machine.add(SCIENCE, 2)  # one core is free, but code waits for two
    assert machine.since() == ["math 0"]
    machine.processes[MATH].end()
    assert machine.since() == ["code 1"]
    machine.processes[CODE].end()
    assert machine.since() == ["science 2"]


def test_more_threads_than_cores_is_no_reason_to_wait_for_ever() -> None:
    machine = Machine(math=8, code=8)
    machine.add(MATH, 0)
    machine.add(MATH, 1)
    machine.add(CODE, 2)
    assert machine.since() == ["math 0", "math 1"]
    machine.processes[MATH].end()
    machine.processes[MATH].end()
    assert machine.since() == ["code 2"]


def test_later_rounds_go_first() -> None:
    machine = Machine(ahead=0)
    again = {visit.role: visit for visit in MIXTURE.visits(2) if visit.round == 2}
    for row in (5, 6):
        machine.add(SUMMARIZER, row)
    machine.add(MATH, 1)
    machine.add(CODE, 3)
    assert machine.since() == ["summarizer 5", "math 1"]
    machine.add(SCIENCE, 7, VISITS[SCIENCE], again[SCIENCE])  # the row that came first is not the one that is furthest
    machine.add(MATH, 9, again[MATH])
    assert machine.since() == ["science 7"]  # ahead of all that are in round 1
    machine.processes[MATH].end()
    assert machine.since() == ["math 9"]
    machine.processes[SUMMARIZER].end()
    machine.processes[SCIENCE].end()
    assert machine.since() == ["summarizer 6"]


def test_other_machines_and_processes_that_start_take_no_cores_here() -> None:
    machine = Machine()
    machine.processes[SUMMARIZER].described.machine = "there"
    machine.processes[MATH].open = False
    machine.add(SUMMARIZER, 0)
    machine.add(MATH, 1)
    machine.add(CODE, 2)
    machine.add(SCIENCE, 3)
    assert machine.since() == ["summarizer 0", "math 1", "code 2", "science 3"]


def test_who_waits_for_cores_holds_up_nobody_on_other_machines() -> None:
    machine = Machine()
    machine.processes[SCIENCE].described.machine = "there"
    machine.add(SUMMARIZER, 0)
    machine.add(MATH, 1)
    machine.add(CODE, 2)  # both cores are taken
    machine.add(SCIENCE, 3)
    assert machine.since() == ["summarizer 0", "math 1", "science 3"]


def test_agents_on_devices_neither_wait_for_cores_nor_take_any() -> None:
    machine = Machine(science=0, summarizer=8)
    machine.add(SCIENCE, 0)
    machine.add(SUMMARIZER, 1)  # more threads than cores
    machine.add(MATH, 2)
    machine.add(SCIENCE, 3)
    assert machine.since() == ["science 0", "summarizer 1", "science 3"]


def test_what_waits_when_all_is_closed_is_not_given() -> None:
    machine = Machine(ahead=0)
    machine.add(MATH, 0)
    machine.add(MATH, 1)
    machine.turns.close()
    machine.processes[MATH].end()
    assert machine.since() == ["math 0"]
