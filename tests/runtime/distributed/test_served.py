"""A server whose agents are in processes of their own: same texts, streams, clients that leave, killed processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from recmas import DISTILLATION, RecursiveMAS
from recmas.config.system_json import read_spec
from recmas.distributed.order import Loading
from recmas.scheduling.dispatcher import Dispatcher, Limits
from recmas.scheduling.executor import Ended, Failed, Report, Wrote
from recmas.scheduling.task import Task
from tests.runtime.distributed.conftest import Pool, saved
from tests.runtime.scheduling.rows import Waiting, row_of

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import openai

from tests.runtime.serving.served import Served, served


@pytest.fixture
def system(tmp_path: Any) -> RecursiveMAS:
    return saved(tmp_path / "system", DISTILLATION)


@pytest.fixture
def server(system: RecursiveMAS, tmp_path: Any, pooled: Pool) -> Iterator[Served]:
    from recmas.distributed.executor import RayExecutor

    folder = tmp_path / "system"
    executor = RayExecutor(read_spec(folder), Loading(folder=str(folder)), pace=0.0)
    with served(system, executor) as one:
        yield one


def ask(server: Served, question: str, **options: Any) -> str:
    answer = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], **options
    )
    return answer.choices[0].message.content or ""


def test_answers_and_streams_are_those_of_one_process(system: RecursiveMAS, server: Served) -> None:
    questions = [f"fox {number}" for number in range(24)]
    expected = [answer.text for answer in system.answer(questions)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda question: ask(server, question), questions)) == expected
    pieces = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": questions[0]}], stream=True, temperature=0.0
    )
    found = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(found) == expected[0]
    assert len([piece for piece in found if piece]) > 1


def test_a_text_that_nobody_waits_for_is_not_written(system: RecursiveMAS, tmp_path: Any, pooled: Pool) -> None:
    """The process is told of a row that was dropped while it writes."""
    from recmas.distributed.executor import RayExecutor

    folder = tmp_path / "system"
    [whole] = system.answer(["fox"], max_new_tokens=200)
    executor = RayExecutor(read_spec(folder), Loading(folder=str(folder)), pace=0.0)
    ends: list[Ended | Failed | Wrote] = []
    start = executor.start

    def watched(task: Task, report: Report) -> None:
        def tell(one: Ended | Failed | Wrote) -> None:
            if task.work.final:
                ends.append(one)
            report(one)

        start(task, tell)

    executor.start = watched  # type: ignore[method-assign]
    dispatcher = Dispatcher(executor, Limits(window=0.0))
    try:
        sink = Waiting()
        row = row_of(system, 0, "fox", sink, max_new_tokens=200)
        sink.text = lambda piece: dispatcher.drop(row, ConnectionAbortedError("left"))  # type: ignore[method-assign]
        dispatcher.add(row)
        assert isinstance(sink.end(), ConnectionAbortedError)
        while not isinstance(ends[-1], Ended):
            time.sleep(0.01)
        assert ends[-1].account.written[0] < len(whole.tokens) == 200
    finally:
        dispatcher.close()


def test_a_server_is_not_ready_while_an_agent_is_gone(
    system: RecursiveMAS, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends while nobody asks; it comes back at first, and later does not."""
    import ray

    from recmas.distributed import replica

    monkeypatch.setattr(replica, "IDLE", 0.02)
    [learner] = server.service._dispatcher.executor._replicas["learner"]  # type: ignore[attr-defined]
    expected, back, launch = ask(server, "fox"), threading.Event(), learner._launch

    def wait_for(status: int) -> None:
        while server.get("/ready") != status:
            time.sleep(0.01)

    def launch_later() -> Any:
        assert back.wait(60)
        return launch()

    def fail() -> Any:
        raise RuntimeError("there is no room")

    learner._launch = launch_later
    assert server.get("/ready") == 200
    learner._watched = ray.put("what ends with the process")
    wait_for(503)
    back.set()
    wait_for(200)
    assert ask(server, "fox") == expected
    learner._launch = fail
    learner._watched = ray.put("what ends with the process")
    wait_for(503)
    while server.service.broken is None:
        time.sleep(0.01)
    with pytest.raises(openai.InternalServerError, match="an agent of this server is gone") as refused:
        ask(server, "fox")
    assert refused.value.status_code == 503
    assert server.get("/ready") == 503


def test_a_killed_process_is_not_noticed_by_clients(
    system: RecursiveMAS, server: Served, pooled: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas.distributed import replica

    executor = server.service._dispatcher.executor
    [learner] = executor._replicas["learner"]  # type: ignore[attr-defined]
    questions = [f"dog {number}" for number in range(8)]
    expected = [answer.text for answer in system.answer(questions)]

    def kill() -> None:
        while not learner.jobs:
            time.sleep(0.001)
        pooled.kill(learner._process)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda question: ask(server, question), questions)) == expected
    killer.join()
    assert executor.restarts == 1  # type: ignore[attr-defined]
    page = server.service.metrics.page().decode()
    assert "recmas_agents_restarted_total 1.0" in page
    assert "recmas_handoffs_refused_total 0.0" in page
    assert server.counted("recmas_batches_repeated_total") >= 1
    # A process is missed, too, that ends while nobody asks.
    gone = threading.Event()
    monkeypatch.setattr(replica, "IDLE", 0.02)
    monkeypatch.setattr(learner, "_start_again", gone.set)
    pooled.kill(learner._process)
    assert gone.wait(60)
    assert server.get("/ready") == 503
