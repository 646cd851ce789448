"""``recmas serve`` in a process: what ends it at once, and that SIGTERM loses and doubles nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.cli import main
from recmas.serving import server
from tests.runtime.commands import recmas
from tests.runtime.scheduling.rows import tiny_system

OWN = "the system's own; raise it or edit system.json"


@pytest.fixture(scope="module")
def system() -> RecursiveMAS:
    return tiny_system(SEQUENTIAL)


@pytest.fixture(scope="module")
def folder(system: RecursiveMAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve") / "tiny"
    system.save_pretrained(place)
    return place


@pytest.fixture
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "recmas", "serve", str(folder), "--port", "0", "--queue", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as started:
        yield started
        started.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from elsewhere; give --api-keys FILE, or --open"),
        (["--api-keys", "nothing"], "nothing: No such file or directory"),
        (["--api-keys", "empty"], "empty: holds no key"),
        (["--api-keys", "short"], "short, line 1: expected a key of at least 16 characters without spaces"),
        (["--api-keys", "loose"], "loose: others may read these keys; chmod 600 loose"),
        (["--port", "70000"], "--port: 70000 is not between 0 and 65535"),
        (["--window", "-1"], "--window: -1.0 is less than 0 or no number"),
        (["--host", "198.51.100.7", "--open"], "198.51.100.7:8000: Cannot assign requested address"),
        (["--tools", "hammer"], "--tools: unknown tool 'hammer'; there is python"),
        (["--max-tokens", "5"], f"--max-tokens: 5 is less than 6, {OWN}"),
        (["--max-rounds", "1"], f"--max-rounds: 1 is less than 2, {OWN}"),
        (["--max-latent-steps", "2"], f"--max-latent-steps: 2 is less than 3, {OWN}"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder: Path, tmp_path: Path, words: list[str], said: str) -> None:
    for name, text in (("empty", "# none\n"), ("short", "abc\n"), ("loose", "a-key-of-some-length\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "loose" else 0o600)
    ended = recmas(tmp_path, "serve", str(folder), *words)
    assert (ended.status, ended.err) == (2, f"recmas: error: {said}\n")


def test_the_address_is_told_as_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "serve", lambda name, outline, executor, *_: executor.close())
    assert main(["serve", str(folder), "--port", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["model"] == "tiny"
    assert err == f"tiny at {told['url']}\n"


def test_a_port_in_use_is_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = recmas(tmp_path, "serve", str(folder), "--port", str(port))
    assert (ended.status, ended.err) == (2, f"recmas: error: 127.0.0.1:{port}: Address already in use\n")


def test_sigterm_under_load_loses_and_doubles_nothing(process: subprocess.Popen[str], system: RecursiveMAS) -> None:
    """Every request that was taken in is answered once, with its own text; the others never reached the server."""
    assert process.stderr is not None
    found = re.search(r"http://\S+", process.stderr.readline())
    assert found is not None
    client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0, timeout=60)
    while True:
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            assert process.poll() is None
            time.sleep(0.01)
    expected = {f"fox {number}": system.answer([f"fox {number}"])[0].text for number in range(8)}
    first, turned_away = threading.Barrier(9), list[openai.APIError]()
    answers: list[tuple[str, str]] = []

    def ask(number: int) -> None:
        question = f"fox {number}"
        for turn in range(200):
            try:
                answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": question}])
            except openai.APIConnectionError as error:
                turned_away.append(error)
                return
            except openai.InternalServerError as error:
                turned_away.append(error)
                return
            answers.append((question, answer.choices[0].message.content or ""))
            if turn == 0:
                first.wait(60)

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        first.wait(60)
        process.send_signal(signal.SIGTERM)
        for one in asking:
            one.result(60)
    assert process.wait(60) == 0
    assert len(turned_away) == 8  # the server ended before anybody was through
    assert {error.status_code for error in turned_away if isinstance(error, openai.APIStatusError)} <= {503}
    assert all(expected[question] == text for question, text in answers)
    counted = re.search(r"answered (\d+), ", process.stderr.read())
    assert counted is not None
    assert int(counted[1]) == len(answers)
