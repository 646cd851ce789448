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
from tests.runtime.distributed.conftest import saved

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("openai", reason="openai is not installed")

from tests.runtime.serving.served import Served, served

pytestmark = pytest.mark.alone  # as many processes as there are cores, and more


@pytest.fixture
def system(tmp_path: Any) -> RecursiveMAS:
    return saved(tmp_path / "system", DISTILLATION)


@pytest.fixture
def server(system: RecursiveMAS, tmp_path: Any, pooled: None) -> Iterator[Served]:
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


def test_a_client_that_leaves_ends_its_text(server: Served) -> None:
    """The text would take far longer than the test waits."""
    executor = server.service._dispatcher.executor
    [learner] = executor._replicas["learner"]  # type: ignore[attr-defined]
    stream = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "fox"}], stream=True, max_tokens=150
    )
    next(iter(stream))
    begun = time.monotonic()
    stream.close()
    while learner.busy:
        assert time.monotonic() < begun + 30
        time.sleep(0.01)
    assert server.counted("recmas_requests_total", outcome="left") == 1
    assert ask(server, "fox") == ask(server, "fox")


def test_a_killed_process_is_not_noticed_by_clients(system: RecursiveMAS, server: Served) -> None:
    import ray

    executor = server.service._dispatcher.executor
    [learner] = executor._replicas["learner"]  # type: ignore[attr-defined]
    questions = [f"dog {number}" for number in range(8)]
    expected = [answer.text for answer in system.answer(questions)]

    def kill() -> None:
        while not learner.busy:
            time.sleep(0.001)
        ray.kill(learner._process)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda question: ask(server, question), questions)) == expected
    killer.join()
    assert executor.restarts == 1  # type: ignore[attr-defined]
