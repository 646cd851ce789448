"""The server, asked by the official client and by clients that do it wrong."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import openai
import pytest

from recmas import MIXTURE, SEQUENTIAL, RecursiveMAS
from recmas.prompts.rows import Fields
from recmas.scheduling.executor import Failed, LocalExecutor, Report
from recmas.scheduling.task import Task
from recmas.scheduling.worker import Worker
from recmas.serving.protocol import ChatRequest
from recmas.serving.server import address
from recmas.serving.settings import ServeSettings
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
    """All are under way before the first is begun; none is lost and none answered twice."""
    questions = [f"{QUESTIONS[number % 6]} {number}" for number in range(200)]
    expected = [answer.text for answer in system.answer(questions, batch_size=32)]
    held = Held(system)
    with served(system, held) as server:

        async def ask_all() -> list[str | None]:
            async with openai.AsyncOpenAI(base_url=f"{server.at}/v1", api_key="none", max_retries=0) as client:
                answers = [
                    asyncio.ensure_future(client.chat.completions.create(model="tiny", messages=asked(question)))
                    for question in questions
                ]
                while server.counted("recmas_requests_under_way") < 200:
                    await asyncio.sleep(0.01)
                held.go.set()
                return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

        assert asyncio.run(ask_all()) == expected
        assert server.counted("recmas_requests_total", outcome="answered") == 200
        assert server.counted("recmas_batch_rows_sum", role="planner") == 400
        assert server.counted("recmas_batch_rows_count", role="planner") < 40
        assert server.counted("recmas_requests_under_way") == 0


def test_keys(system: RecursiveMAS, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("# ours\n\na-key-of-some-length\nanother-key-of-some-length\n")
    with served(system, keys=keys) as server:
        for key in ("a-key-of-some-length", "another-key-of-some-length"):
            assert server.client(key).models.list().data[0].id == "tiny"
            server.client(key).chat.completions.create(model="tiny", messages=asked("fox"))
        with pytest.raises(openai.AuthenticationError):
            server.client("a-key-of-some-lengtH").models.list()
        with pytest.raises(openai.AuthenticationError):
            server.client("a-key-of-some-lengtH").models.retrieve("tiny")
        body = json.dumps({"model": "tiny", "messages": asked("fox")}).encode()
        for wrong in ("a-key-of-some-lengtH", "# ours", "", "a-key", "\xff\xfe"):
            status, said = raw(server, body, {"Authorization": f"Bearer {wrong}"})
            assert (status, said["error"]["code"]) == (401, "invalid_api_key")
        assert raw(server, body)[0] == 401


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
    "field that nothing reads": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "fields": {"contxt": "y"}}',
        400,
        "invalid_value",
    ),
    "steps of texts": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "mode": "text", "latent_steps": 1}',
        400,
        "invalid_value",
    ),
    "options of no stream": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": true}}',
        400,
        "invalid_value",
    ),
    "stop": (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": ["y"]}', 400, "invalid_value"),
    "large": (b'{"x": "' + b"x" * (1 << 20) + b'"}', 413, "too_large"),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", True), ("logprobs", 0), ("top_logprobs", False), ("presence_penalty", False), ("parallel_tool_calls", 1)]
    + [(name, True) for name in ("temperature", "top_p", "seed", "max_tokens", "rounds", "latent_steps")],
)
def test_a_boolean_is_no_number(server: Served, name: str, value: object) -> None:
    status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x"), name: value}).encode())
    assert status == 400, said
    assert name in said["error"]["message"]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_told_why(server: Served, case: str) -> None:
    body, status, code = WRONG[case]
    found, said = raw(server, body)
    assert found == status, said
    error = said["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert not error["message"].startswith("row 0")
    assert code is None or error["code"] == code


def test_what_asks_for_nothing_is_taken(server: Served) -> None:
    nothing = {
        "n": 1,
        "stop": None,
        "frequency_penalty": 0,
        "seed": None,
        "tools": [],
        "response_format": {"type": "text"},
    }
    status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x"), **nothing}).encode())
    assert status == 200, said
    status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x"), "tools": [{}]}).encode())
    assert (status, said["error"]["message"], said["error"]["param"]) == (
        400,
        "this server does not do `tools`",
        "tools",
    )


def test_an_answer_may_be_sent_back_as_clients_hold_it(server: Served, system: RecursiveMAS) -> None:
    """They keep fields that said nothing; one that says something is refused."""
    before, chat = asked("fox"), [*asked("fox"), {"role": "assistant", "content": "dog"}, *asked("0 + 1 =")]
    said = {**chat[1], "refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    status, found = raw(server, json.dumps({"model": "tiny", "messages": [*before, said, chat[2]]}).encode())
    assert status == 200, found
    assert found["choices"][0]["message"]["content"] == system.answer([chat])[0].text
    said["tool_calls"] = [{"id": "x"}]
    status, found = raw(server, json.dumps({"model": "tiny", "messages": [*before, said, chat[2]]}).encode())
    assert (status, found["error"]["param"]) == (400, "messages.1.tool_calls")


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        ({"latent_steps": -1}, "latent_steps", "greater than or equal to 0"),
        ({"latent_steps": {"planner": -1}}, "latent_steps.planner", "greater than or equal to 0"),
        ({"fields": {"sheet": [1]}}, "fields.sheet", "valid string"),
        ({"seed": 10**4000}, "seed", "less than"),
    ],
)
def test_what_is_wrong_is_named_as_the_request_has_it(
    server: Served, request_: dict[str, object], param: str, message: str
) -> None:
    status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x"), **request_}).encode())
    assert (status, said["error"]["param"]) == (400, param), said
    assert message in said["error"]["message"]


def test_an_integer_of_any_length_is_a_wrong_request(server: Served) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "rounds": ' + b"9" * 5000 + b"}"
    status, said = raw(server, body)
    assert status == 400, said


def test_refusals_are_counted(server: Served) -> None:
    before = server.counted("recmas_requests_total", outcome="refused")
    for case in ("not json", "stop", "model", "field that nothing reads"):
        raw(server, WRONG[case][0])
    assert server.counted("recmas_requests_total", outcome="refused") == before + 4


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_of_text_at_the_bound_is_a_stop(
    system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    tokens = system.answer(["fox"])[0].tokens
    agent = system.agents["solver"]
    monkeypatch.setattr(type(agent), "eos_ids", property(lambda self: frozenset({tokens[0]} if self is agent else ())))
    with served(system) as server:
        found = server.client().chat.completions.create(
            model="tiny", messages=asked("fox"), max_tokens=1, stream=stream
        )
        whole = list(found)[-1] if stream else found
        assert whole.choices[0].finish_reason == "stop"


def test_what_failed_is_in_the_log_and_not_in_the_answer(
    system: RecursiveMAS, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(LocalExecutor):
        def start(self, task: Task, report: Report) -> None:
            report(Failed(task, ValueError("/a/path of this machine")))

    with served(system, Broken(system)) as server:
        status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x")}).encode())
    assert status == 500
    assert "/a/path" not in said["error"]["message"]
    name = said["error"]["message"].rpartition(" ")[2]
    assert name.startswith("chatcmpl-")
    logged = [record for record in caplog.records if name in record.getMessage()]
    assert [str(record.exc_info[1]) for record in logged if record.exc_info] == ["/a/path of this machine"]


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("CUDA error: unspecified launch failure", 503),
        ("CUDA error: an illegal memory access was encountered", 503),
        ("CUDA error: invalid argument", 200),
        ("the batch is too large", 200),
    ],
)
def test_a_server_whose_device_is_gone_is_not_ready(
    system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, said: str, status: int
) -> None:
    def fail(self: Worker, *given: object) -> NoReturn:
        raise RuntimeError(said + "\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(Worker, "think", fail)
    body = json.dumps({"model": "tiny", "messages": asked("x")}).encode()
    with served(system) as server:
        assert server.get("/ready") == 200
        assert raw(server, body)[0] == 500
        assert server.get("/ready") == status
        if status == 503:
            for _ in range(2):
                found, answer = raw(server, body)
                assert (found, answer["error"]["code"]) == (503, "agent_gone")
            assert [record.getMessage() for record in caplog.records].count("no request is answered any more") == 1
    assert server.counted("recmas_requests_under_way") == 0


def test_a_mistake_of_the_server_is_an_error_like_others(
    system: RecursiveMAS, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reason is in the log alone, it is counted, and its place in the queue is free again."""

    class Broken(LocalExecutor):
        def rooms(self, rounds: int, row: Fields) -> NoReturn:
            raise KeyError("/a/path of this machine")

    with served(system, Broken(system), queue=1) as server:
        for _ in range(2):
            status, said = raw(server, json.dumps({"model": "tiny", "messages": asked("x")}).encode())
            assert (status, said["error"]["type"], said["error"]["code"]) == (500, "server_error", "failed")
            assert "/a/path" not in said["error"]["message"]
        assert server.counted("recmas_requests_total", outcome="failed") == 2
        assert server.counted("recmas_requests_under_way") == 0
    assert capsys.readouterr().err.count("KeyError: '/a/path of this machine'") == 2


def test_who_waits_when_draining_ends_is_told(system: RecursiveMAS) -> None:
    held = Held(system)
    with served(system, held) as server, ThreadPoolExecutor(2) as pool:
        body = json.dumps({"model": "tiny", "messages": asked("fox")}).encode()
        waiting = pool.submit(raw, server, body)
        streams = pool.submit(
            lambda: list(server.client().chat.completions.create(model="tiny", messages=asked("fox"), stream=True))
        )
        while server.counted("recmas_requests_under_way") < 2 or not held.started:
            time.sleep(0.002)
        server.stop(drain=0.1)
        status, said = waiting.result(60)
        assert (status, said["error"]["code"]) == (503, "draining")
        with pytest.raises(openai.APIError, match="shut down"):
            streams.result(60)
        held.go.set()
    assert server.counted("recmas_requests_total", outcome="drained") == 2


def test_other_ways_in_are_shut(server: Served) -> None:
    """A page of another site can send neither plain text nor a name of its own for this address."""
    body = json.dumps({"model": "tiny", "messages": asked("x")}).encode()
    assert raw(server, body, {"Content-Type": "text/plain"})[0] == 415
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "localhost@evil.example", "[::1", ""):
        status, said = raw(server, body, {"Host": host})
        assert (status, said["error"]["code"]) == (400, "wrong_host"), host
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        assert raw(server, body, {"Host": host})[0] == 200, host


def test_the_page_may_load_nothing_and_ask_this_server_alone(server: Served) -> None:
    connection = http.client.HTTPConnection(server.at.removeprefix("http://"), timeout=60)
    connection.request("GET", "/")
    rules = connection.getresponse().headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} < set(rules)


def test_an_address_serves_one_server() -> None:
    """It is taken before models are loaded, so that a second server does not load them for nothing."""
    with address(ServeSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port}: Address already in use"):  # noqa: SIM117
            with address(ServeSettings(port=port)):
                pass


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
    listed = server.client().models.list().data[0]
    assert server.client().models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError, match="model: 'owner/other' is not here; this is 'tiny'"):
        server.client().models.retrieve("owner/other")
    described = listed.model_extra["recmas"]
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
