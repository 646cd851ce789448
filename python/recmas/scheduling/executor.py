"""`Executor`: runs tasks on agents. `LocalExecutor` does so in threads of this process, one per device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

from recmas.devices.failure import is_final, named
from recmas.prompts.rows import Fields
from recmas.scheduling.admission import Admission, Room
from recmas.scheduling.gather import Place, gather
from recmas.scheduling.task import Account, Grown, Piece, Task
from recmas.scheduling.worker import Worker
from recmas.system.system import System
from recmas.tools import Toolbox


class Wrote(NamedTuple):
    """A task's rows have grown: what each did, by place in the batch."""

    task: Task
    grown: Mapping[int, Grown]


class Ended(NamedTuple):
    """A task has ended; `message` is for `Piece`, None after an answer."""

    task: Task
    message: Any
    account: Account


class Failed(NamedTuple):
    """A task has failed.

    Attributes:
        task: which.
        error: why.
        lost: neither rows nor agent are to blame: a process or what it held is gone, and the task may run again.
        inputs: what the rows had read is gone, too: they must begin their walk again.
        begun: False where the task was still waiting: its rows cannot be why it was lost.
    """

    task: Task
    error: Exception
    lost: bool = False
    inputs: bool = False
    begun: bool = True


class Lane(NamedTuple):
    """Where tasks run: agents of equal `key` share it, and it takes so many tasks at once."""

    key: object
    tasks: int


Report = Callable[[Wrote | Ended | Failed], object]


class Executor(Protocol):
    """Runs tasks; reports come from any thread, for every task in order, the last one an `Ended` or `Failed`."""

    @property
    def lanes(self) -> Mapping[str, Lane]:
        """By role, where its tasks run."""

    @property
    def faults(self) -> Mapping[str, int]:
        """How often what went wrong, by its name in words; empty where nothing of the kind can."""

    @property
    def ready(self) -> bool:
        """Whether every agent is there to do what it is asked."""

    @property
    def broken(self) -> Exception | None:
        """Why an agent will do nothing any more; None while all are there, or are coming back."""

    def start(self, task: Task, report: Report) -> None:
        """Begin a task."""

    def rooms(self, rounds: int, row: Fields) -> Mapping[str, Room]:
        """By role, what a row takes in a run of so many rounds.

        Raises:
            ValueError: the row cannot be made a prompt of.
        """

    def close(self) -> None:
        """End everything; tasks under way are not reported any more."""


class LocalExecutor:
    """Runs the agents of a loaded system in threads, one per device.

    Args:
        system: whose agents run; nobody else may write its weights until `close`.
        toolbox: what the last agent may call.
        prefix_reuse: as for `Worker`.
    """

    def __init__(self, system: System, toolbox: Toolbox | None = None, *, prefix_reuse: bool = True) -> None:
        self._scope = ExitStack()
        self._scope.callback(system.unload_weights)
        self._scope.enter_context(system.packed_links())
        self._workers = {
            role: Worker(
                system.member(role),
                toolbox if role == system.pattern.last else None,
                prefix_reuse=prefix_reuse,
                load_weights=partial(system.load_weights, role),
                weights_stay=system.offloader is None,
            )
            for role in system.pattern.roles
        }
        self._admissions = {role: Admission.of(system.member(role)) for role in system.pattern.roles}
        self.broken: Exception | None = None
        self._devices = system.devices
        one = system.offloader is not None  # a single agent at a time is on a device
        threads: dict[object, _Thread] = {}
        self._threads = {
            role: threads.setdefault(None if one else device, _Thread()) for role, device in self._devices.items()
        }

    @property
    def lanes(self) -> Mapping[str, Lane]:
        return {role: Lane(thread, 1) for role, thread in self._threads.items()}

    @property
    def faults(self) -> Mapping[str, int]:
        return {}

    @property
    def ready(self) -> bool:
        return self.broken is None

    def start(self, task: Task, report: Report) -> None:
        self._threads[task.work.role].run(lambda: self._run(task, report))

    def rooms(self, rounds: int, row: Fields) -> Mapping[str, Room]:
        return {role: admission.room(rounds, row) for role, admission in self._admissions.items()}

    def close(self) -> None:
        for thread in set(self._threads.values()):
            thread.close()
        self._scope.close()

    def _run(self, task: Task, report: Report) -> None:
        role = task.work.role
        worker = self._workers[role]
        try:
            with named(f"agent {role!r}", self._devices[role]):
                messages = {sender: _gathered(pieces) for sender, pieces in task.messages.items()}
                if task.work.latent_steps is not None:
                    ended = Ended(task, *worker.think(task, messages))
                elif not task.work.final:
                    ended = Ended(task, *worker.text(task, messages))
                else:
                    account = Account()
                    for grown in worker.write(task, messages, account):
                        report(Wrote(task, grown))
                    ended = Ended(task, None, account)
        except Exception as error:  # of whatever kind: it is the rows' answer
            if is_final(error):
                self.broken = error
            report(Failed(task, error))
        else:
            report(ended)


class _Thread:
    """One thread that runs one call after another."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="recmas agent", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _gathered(pieces: Sequence[Piece | None]) -> Any:
    batches: list[Any] = []
    places: list[Place] = []
    for piece in pieces:
        if piece is None:
            places.append(None)
            continue
        known = next((index for index, batch in enumerate(batches) if batch is piece.batch), len(batches))
        if known == len(batches):
            batches.append(piece.batch)
        places.append((known, piece.row))
    return gather(batches, places)
