"""Processes are killed, messages changed, rows fail: every other question is answered once, with its text."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from recmas import DISTILLATION, AnswerOptions, RecursiveMAS
from recmas.answering.answers import Answers, RowsFailedError
from recmas.config.system_json import PlacementSpec, SystemSpec
from recmas.distributed.agent_process import AgentProcess
from recmas.distributed.order import Described, Done, Loading, Order
from recmas.scheduling.dispatcher import Dispatcher
from recmas.scheduling.executor import Failed
from recmas.scheduling.row import Row
from recmas.system.fingerprint import link_digest
from tests.runtime.distributed.conftest import Pool, saved
from tests.torture.amounts import FULL, SEED

KILLS, KILLED, TAMPERED = (20, 500, 500) if FULL else (2, 60, 12)


class Frail(AgentProcess):
    """An agent whose process runs out of memory over more than two rows, and is ended by a row that says so."""

    def load(self, loading: Loading, spec: SystemSpec, role: str, device: str, key: bytes) -> Described:
        if loading.dtype == "float16":
            raise MemoryError
        return super().load(loading, spec, role, device, key)

    def run(self, order: Order, *sealed: bytes) -> tuple[Done, bytes]:
        if len(order.task.parts) > 2:
            raise MemoryError("too many rows")
        return super().run(order, *sealed)


@pytest.fixture
def system(tmp_path: Path) -> tuple[RecursiveMAS, Loading]:
    return saved(tmp_path / "system", DISTILLATION), Loading(folder=str(tmp_path / "system"))


class Counted:
    """How often each row was answered."""

    def __init__(self, rows: int) -> None:
        self.times = [0] * rows

    def __call__(self, numbers: Sequence[int], answers: Answers) -> None:
        for number in numbers:
            self.times[number] += 1


def test_killed_processes_lose_and_double_nothing(
    system: tuple[RecursiveMAS, Loading], pooled: Pool, record_property: Any
) -> None:
    import ray

    from recmas.distributed.replica import Replica
    from recmas.distributed.system import RaySystem

    local, loading = system
    questions = [f"fox {number}" for number in range(KILLED)]
    expected = [answer.text for answer in local.answer(questions, batch_size=32)]
    chance = random.Random(SEED)
    with RaySystem(loading) as cluster:
        replicas = [one for replicas in cluster.executor._replicas.values() for one in replicas]
        kills, over = [0, 0], threading.Event()

        def loaded(victim: Replica) -> bool:
            return bool(ray.wait([victim._loaded], timeout=0)[0])

        def kill() -> None:
            """One process after another, each after it has begun to work again; the first one's replacement, too."""
            while kills[0] < KILLS and not over.is_set():
                victim = chance.choice(replicas)
                if victim.jobs and loaded(victim):
                    time.sleep(chance.random() * 0.05)
                    begun = victim._loaded
                    pooled.kill(victim._process)
                    kills[0] += 1
                    while victim._loaded is begun and not over.wait(0.01):
                        pass
                    if kills[0] % 5 == 1 and not loaded(victim):
                        pooled.kill(victim._process)
                        kills[0] += 1
                        kills[1] += 1
                over.wait(0.01)

        killer = threading.Thread(target=kill)
        killer.start()
        counted, answers = Counted(KILLED), None
        try:
            while kills[0] < KILLS or answers is None:  # more passes over the same questions, if kills are left
                counted = Counted(KILLED)
                answers = cluster.answer(questions, batch_size=8, on_answers=counted)
                assert [answer.text for answer in answers] == expected
                assert counted.times == [1] * KILLED
        finally:
            over.set()
            killer.join()
        assert cluster.executor.restarts >= KILLS
        assert kills[1] > 0
        assert cluster.executor.refused == 0
    record_property("torture", ("processes of agents killed", KILLS, f"{KILLED} questions answered once, same texts"))


@pytest.mark.usefixtures("pooled")
def test_changed_messages_are_refused_and_made_again(
    system: tuple[RecursiveMAS, Loading], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    import ray

    from recmas.distributed.replica import Job, Replica
    from recmas.distributed.system import RaySystem

    local, loading = system
    questions = [f"fox {number}" for number in range(TAMPERED)]
    expected = [answer.text for answer in local.answer(questions, rounds=1)]
    chance = random.Random(SEED)
    changed, seen, give = set[int](), list[bytes](), Replica.give

    def tamper(self: Replica, job: Job) -> None:
        """The first message for every row is changed by a bit, or is an earlier one of the same agent."""
        row = job.task.parts[0].number
        if job.messages and row not in changed:
            changed.add(row)
            [stamp] = job.order.stamps
            assert (stamp.system, stamp.link) == (local.fingerprint(), link_digest(local.inner_links["expert"]))
            message = bytearray(ray.get(job.messages[0]))
            seen.append(bytes(message))
            message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
            sent = seen[-2] if row % 2 else bytes(message)
            job = job._replace(messages=(ray.put(sent), *job.messages[1:]))
        give(self, job)

    with RaySystem(loading) as cluster:
        honest = cluster.answer(questions, rounds=1, batch_size=1)
        assert [answer.text for answer in honest] == expected
        assert cluster.executor.refused == 0
        monkeypatch.setattr(Replica, "give", tamper)
        found = cluster.answer(questions, rounds=1, batch_size=1)
        assert [answer.text for answer in found] == expected
        assert cluster.executor.refused == len(changed) == TAMPERED
        assert cluster.faults == {"handoffs refused": TAMPERED, "agents restarted": 0, "batches repeated": TAMPERED}
    record_property("torture", ("changed handoffs", TAMPERED, f"all refused, and none of {TAMPERED} honest ones"))


@pytest.mark.usefixtures("pooled")
def test_messages_that_are_always_changed_are_an_error(
    system: tuple[RecursiveMAS, Loading], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from recmas.distributed.replica import Job, Replica
    from recmas.distributed.system import RaySystem

    give = Replica.give

    def tamper(self: Replica, job: Job) -> None:
        give(self, job._replace(messages=tuple(ray.put(b"RECMAS1\n" + bytes(64)) for _ in job.messages)))

    monkeypatch.setattr(Replica, "give", tamper)
    with (
        RaySystem(system[1]) as cluster,
        pytest.raises(RowsFailedError, match="row 0: the message of 'expert' was changed on its way"),
    ):
        cluster.answer(["fox"], rounds=1)
    assert not caplog.records  # Ray tells of errors that nobody has looked at


@pytest.mark.usefixtures("pooled")
def test_a_row_that_fails_leaves_the_others(system: tuple[RecursiveMAS, Loading]) -> None:
    """The learner reads the expert's text, and with it this question does not fit its context any more."""
    from recmas.distributed.system import RaySystem

    local, loading = system
    questions = ["fox", "plan", "?"]
    options: dict[str, Any] = {"mode": "text", "rounds": 1, "batch_size": 3}
    expected = [answer.text for answer in local.answer(questions, **options)]
    with RaySystem(loading) as cluster:
        words = 1
        while True:  # the longest question that is let in
            try:
                cluster.check(["0 " * (words + 1)], AnswerOptions(**options))
            except ValueError:
                break
            words += 1
        with pytest.raises(RowsFailedError, match="row 1: agent 'learner': ") as failure:
            cluster.answer([questions[0], "0 " * words, *questions[1:]], **options)
        assert failure.value.failed.keys() == {1}
        assert [failure.value.answers[number].text for number in (0, 2, 3)] == expected
        assert cluster.executor.restarts == 0


@pytest.mark.usefixtures("pooled")
def test_a_process_that_cannot_be_started_again_leaves_its_rows_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas.distributed.replica import Replica, Told
    from recmas.distributed.system import RaySystem

    local = saved(tmp_path / "system", DISTILLATION)
    local.settings["learner"].placement = PlacementSpec(replicas=2, threads=1)
    local.save_pretrained(tmp_path / "system")
    questions = [f"fox {number}" for number in range(8)]
    options: dict[str, Any] = {"temperature": 0.7, "seed": 3, "batch_size": 1}
    expected = [answer.text for answer in local.answer(questions, **options)]

    def lose(replica: Replica) -> None:
        """It is lost with its next job, and cannot be started again, which is known when it may have another job."""

        def launch() -> Any:
            deadline = time.monotonic() + 0.5
            while not replica.jobs and time.monotonic() < deadline:
                time.sleep(0.001)
            raise RuntimeError("there is no room")

        def done(told: Told) -> Failed:
            return Failed(told.job.task, ConnectionError("gone"), lost=True)

        monkeypatch.setattr(replica, "_launch", launch)
        monkeypatch.setattr(replica, "_done", done)

    with RaySystem(Loading(folder=str(tmp_path / "system"))) as cluster:
        assert [answer.text for answer in cluster.answer(questions, **options)] == expected
        first, second = cluster.executor._replicas["learner"]
        lose(first)
        assert [answer.text for answer in cluster.answer(questions, **options)] == expected
        while first.broken is None:
            time.sleep(0.01)
        assert str(first.broken) == "there is no room"
        assert (first.restarts, second.restarts) == (1, 0)
        lose(second)
        with pytest.raises(RowsFailedError, match="there is no room") as failure:
            cluster.answer(questions[:2], **options)
        assert failure.value.failed.keys() == {0, 1}


@pytest.mark.usefixtures("pooled")
def test_a_process_that_comes_back_with_other_weights_is_not_used(
    system: tuple[RecursiveMAS, Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas.distributed.replica import Told
    from recmas.distributed.system import RaySystem

    with RaySystem(system[1]) as cluster:
        [learner] = cluster.executor._replicas["learner"]
        weights = Path(system[1].folder) / "agents" / "learner" / "model.safetensors"
        other = {name: tensor + 1 for name, tensor in load_file(weights).items()}
        save_file(other, weights, {"format": "pt"})

        def lose(told: Told) -> Failed:
            return Failed(told.job.task, ConnectionError("gone"), lost=True)

        monkeypatch.setattr(learner, "_done", lose)
        with pytest.raises(RowsFailedError, match="agent 'learner': its files have changed since it was first loaded"):
            cluster.answer(["fox"])


def test_replicas_with_other_weights_are_refused() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    from recmas.distributed.executor import RayExecutor

    class Loaded:
        def __init__(self, digest: str) -> None:
            self.digest = digest

        def begin(self) -> Loaded:
            return self

    executor = object.__new__(RayExecutor)
    executor._replicas = {"a": [Loaded("x"), Loaded("x")], "b": [Loaded("x"), Loaded("y")]}  # type: ignore[list-item]
    executor._loaded("a")
    with pytest.raises(ValueError, match="agent 'b': its replicas have not loaded the same files"):
        executor._loaded("b")


@pytest.mark.usefixtures("pooled")
def test_few_rows_are_under_way_and_messages_go_with_them(
    system: tuple[RecursiveMAS, Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas.distributed.replica import Sent
    from recmas.distributed.system import RaySystem

    counted, held = Counted(24), []

    def count(numbers: Sequence[int], answers: Answers) -> None:
        counted(numbers, answers)
        if sum(counted.times) == 24:
            held.append(sum(type(one) is Sent for one in gc.get_objects()))

    def watched(self: Dispatcher, *rows: Row) -> None:
        added[0] += len(rows)
        under_way.append(added[0] - sum(counted.times))
        add(self, *rows)

    added, under_way, add = [0], list[int](), Dispatcher.add
    monkeypatch.setattr(Dispatcher, "add", watched)
    with RaySystem(system[1], in_flight=2) as cluster:
        cluster.answer([f"fox {number}" for number in range(24)], batch_size=1, on_answers=count)
    assert max(under_way) == 2
    assert 0 < held[0] < 12  # those of the last rows; 24 rows have had 72


@pytest.mark.skipif(not FULL, reason="starts four processes more: make torture")
@pytest.mark.usefixtures("ray_cluster")
def test_a_batch_that_memory_does_not_hold_goes_in_parts(
    system: tuple[RecursiveMAS, Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    from recmas.distributed import executor
    from recmas.distributed.system import RaySystem

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(executor, "AgentProcess", Frail)
    local, loading = system
    questions = [f"fox {number}" for number in range(5)]
    expected = [answer.text for answer in local.answer(questions)]
    try:
        with RaySystem(loading) as cluster:
            assert [answer.text for answer in cluster.answer(questions)] == expected
            assert cluster.executor.restarts == 0
        with pytest.raises(ValueError, match="agent 'expert': its process ended before it had loaded; is there enough"):
            RaySystem(replace(loading, dtype="float16"))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
