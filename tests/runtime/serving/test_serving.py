"""The server, asked by the official client and by clients that do it wrong."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from recmas import MIXTURE, SEQUENTIAL, RecursiveMAS
from recmas.scheduling.executor import LocalExecutor, Report
from recmas.scheduling.task import Task
from recmas.serving.protocol import ChatRequest
from tests.runtime.scheduling.rows import QUESTIONS, tiny_system
from tests.runtime.serving.served import Served, served


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def system() -> RecursiveMAS:
    return tiny_system(SEQUENTIAL)


@pytest.fixture(scope="module")
def server(system: RecursiveMAS) -> Iterator[Served]:
    with served(system) as found:
        yield found


def raw(server: Served, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(server.at.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_an_answer_and_what_it_took(server: Served, system: RecursiveMAS) -> None:
    expected = system.answer(["what is the answer?"])[0]
    found = server.client().chat.completions.create(model="tiny", messages=asked("what is the answer?"))
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == sum(expected.text_tokens.values())
    assert found.usage.model_extra["latent_steps"] == sum(expected.latent_steps.values())
    assert found.usage.model_extra["latent_steps_by_role"] == expected.latent_steps
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


@pytest.mark.parametrize("options", [{"rounds": 1}, {"latent_steps": {"planner": 1}}, {"mode": "text"}])
def test_our_own_fields(server: Served, system: RecursiveMAS, options: dict[str, object]) -> None:
    expected = system.answer(["fox"], temperature=0.9, seed=3, max_new_tokens=4, **options)[0]
    found = server.client().chat.completions.create(
        model="tiny", messages=asked("fox"), temperature=0.9, seed=3, max_tokens=4, extra_body=options
    )
    assert found.choices[0].message.content == expected.text
    assert found.usage.model_extra["text_tokens_by_role"] == expected.text_tokens


def test_a_stream_joins_to_the_answer(server: Served, system: RecursiveMAS) -> None:
    expected = system.answer(["the lazy dog"])[0]
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=asked("the lazy dog"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"trace": True},
    )
    pieces, visits, usage = [], [], None
    for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        visits += [chunk.model_extra["recmas"]["visit"]] if "recmas" in chunk.model_extra else []
        usage = chunk.usage or usage
    assert "".join(pieces) == expected.text
    assert len([piece for piece in pieces if piece]) > 1
    assert [(visit["round"], visit["role"]) for visit in visits] == [
        (visit.round, visit.role) for visit in system.pattern.visits(2)
    ]
    assert [len(latents) for latents in visits[1]["nearest"].values()] == [3]
    assert usage.completion_tokens == sum(expected.text_tokens.values())


def test_a_chat_goes_before_the_question(server: Served, system: RecursiveMAS) -> None:
    chat = [
        {"role": "system", "content": "plan"},
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "0 + 1 ="},
    ]
    found = server.client().chat.completions.create(model="tiny", messages=chat)
    assert found.choices[0].message.content == system.answer([chat])[0].text


def test_two_hundred_at_once_each_get_their_own(system: RecursiveMAS) -> None:
    questions = [f"{QUESTIONS[number % 6]} {number}" for number in range(200)]
    expected = [answer.text for answer in system.answer(questions, batch_size=1)]
    with served(system, window=20.0) as server, ThreadPoolExecutor(200) as pool:
        client = server.client()

        def ask(question: str) -> str:
            return client.chat.completions.create(model="tiny", messages=asked(question)).choices[0].message.content

        assert list(pool.map(ask, questions)) == expected
        assert server.counted("recmas_requests_total", outcome="answered") == 200
        batches = server.counted("recmas_batch_rows_count", role="planner")
        assert server.counted("recmas_batch_rows_sum", role="planner") == 400
        assert batches < 100
        assert server.counted("recmas_requests_under_way") == 0


def test_keys(system: RecursiveMAS, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("# ours\n\na-key-of-some-length\nanother-key-of-some-length\n")
    with served(system, keys=keys) as server:
        for key in ("a-key-of-some-length", "another-key-of-some-length"):
            assert server.client(key).models.list().data[0].id == "tiny"
            server.client(key).chat.completions.create(model="tiny", messages=asked("fox"))
        for wrong in ("a-key-of-some-lengtH", "# ours", "", "a-key"):
            with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
                server.client(wrong).chat.completions.create(model="tiny", messages=asked("fox"))
        assert raw(server, b"{}")[0] == 401
        assert raw(server, b"{}", {"Authorization": "Bearer \xff\xfe"})[0] == 401


WRONG = {
    "not json": (b"{", 400, "invalid_json"),
    "deep": (b"[" * 100_000, 400, "invalid_json"),
    "no messages": (b'{"model": "tiny", "messages": []}', 400, "invalid_value"),
    "unknown field": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "latent_step": 3}',
        400,
        None,
    ),
    "two answers": (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 2}', 400, None),
    "rounds": (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "rounds": 17}', 400, "too_much"),
    "steps": (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "latent_steps": 9999}', 400, None),
    "role": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "latent_steps": {"nobody": 1}}',
        400,
        None,
    ),
    "last": (b'{"model": "tiny", "messages": [{"role": "assistant", "content": "x"}]}', 400, "invalid_value"),
    "model": (b'{"model": "big", "messages": [{"role": "user", "content": "x"}]}', 404, "model_not_found"),
    "surrogate": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    "context": (b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"fox " * 300 + b'"}]}', 400, None),
    "large": (b'{"x": "' + b"x" * (1 << 20) + b'"}', 413, "too_large"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_told_why(server: Served, case: str) -> None:
    body, status, code = WRONG[case]
    found, said = raw(server, body)
    assert found == status, said
    error = said["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert code is None or error["code"] == code


def test_other_ways_in_are_shut(server: Served) -> None:
    """A page of another site can send neither plain text nor a name of its own for this address."""
    body = json.dumps({"model": "tiny", "messages": asked("x")}).encode()
    assert raw(server, body, {"Content-Type": "text/plain"})[0] == 415
    connection = http.client.HTTPConnection(server.at.removeprefix("http://"), timeout=60)
    connection.request("GET", "/v1/models", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400


class Held(LocalExecutor):
    """An executor whose tasks begin when they are let go."""

    def __init__(self, system: RecursiveMAS) -> None:
        super().__init__(system)
        self.go, self.started = threading.Event(), 0

    def start(self, task: Task, report: Report) -> None:
        self.started += 1
        threading.Thread(target=lambda: self.go.wait(60) and super(Held, self).start(task, report), daemon=True).start()


def test_a_full_queue_says_when_to_come_again(system: RecursiveMAS) -> None:
    held = Held(system)
    with served(system, held, queue=3) as server, ThreadPoolExecutor(3) as pool:
        client = server.client()
        waiting = [pool.submit(client.chat.completions.create, model="tiny", messages=asked("fox")) for _ in range(3)]
        while server.counted("recmas_requests_under_way") < 3:
            time.sleep(0.002)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="tiny", messages=asked("fox"))
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        held.go.set()
        assert all(answer.result(60).choices[0].message.content is not None for answer in waiting)
        client.chat.completions.create(model="tiny", messages=asked("fox"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(system: RecursiveMAS, stream: bool) -> None:
    held = Held(system)
    with served(system, held) as server:
        connection = http.client.HTTPConnection(server.at.removeprefix("http://"), timeout=60)
        body = json.dumps({"model": "tiny", "messages": asked("fox"), "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().status == 200
        while held.started < 1:
            time.sleep(0.002)
        connection.sock.close() if connection.sock else None
        connection.close()
        while server.counted("recmas_requests_under_way"):
            time.sleep(0.002)
        assert server.counted("recmas_requests_total", outcome="left") == 1
        held.go.set()
        other = server.client().chat.completions.create(model="tiny", messages=asked("fox"))
        assert other.choices[0].message.content == system.answer(["fox"])[0].text


def test_who_waits_too_long_is_told(system: RecursiveMAS) -> None:
    held = Held(system)
    with served(system, held, timeout=0.2) as server:
        with pytest.raises(openai.InternalServerError) as late:
            server.client().chat.completions.create(model="tiny", messages=asked("fox"))
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="time"):
            for _ in server.client().chat.completions.create(model="tiny", messages=asked("fox"), stream=True):
                pass
        held.go.set()


def test_the_other_pages(server: Served) -> None:
    for path, kind in (("/", "text/html"), ("/health", "json"), ("/ready", "json"), ("/metrics", "text/plain")):
        connection = http.client.HTTPConnection(server.at.removeprefix("http://"), timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        assert kind in answer.headers["content-type"]
        text = answer.read().decode()
        assert "http://" not in text
        assert "https://" not in text
    described = server.client().models.list().data[0].model_extra["recmas"]
    assert described["stages"] == [["planner"], ["critic"], ["solver"]]
    assert described["rounds"] == 2


def test_a_mixture_is_served_too() -> None:
    system = tiny_system(MIXTURE)
    with served(system) as server:
        found = server.client().chat.completions.create(model="tiny", messages=asked("fox"))
        assert found.choices[0].message.content == system.answer(["fox"])[0].text


def test_every_field_of_a_request_stands_in_its_docstring_or_is_openais() -> None:
    ours = {"mode", "rounds", "latent_steps", "fields", "trace"}
    assert all(f"`{name}`" in (ChatRequest.__doc__ or "") for name in ours)
    assert ours < set(ChatRequest.model_fields)
