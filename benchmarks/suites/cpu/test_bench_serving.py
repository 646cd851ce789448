"""A server under load: clients of the official library ask one question after another, and share batches or do not.

Two servers, each a process of its own with the relay lab on this machine's cores, which the clients use, too: one puts
requests into batches, the other answers one by one. A timed call is a number of questions, asked by so many clients at
once; every answer is that of one process. The record adds what a request took from the first server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels, Samples
from benchmarks.harness.time_bound import TimeBound
from recmas import RecursiveMAS
from recmas.prompts.template import Template

pytestmark = pytest.mark.runtime

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

ROOT = Path(__file__).parents[3]
RELAY = ROOT / "examples" / "relay"
ONE_BY_ONE = "one by one"
ROUNDS = 5
BOUND = TimeBound(call_seconds=8.0, all_seconds=25.0)


@dataclass(frozen=True)
class Case:
    """So many clients, and questions that they ask together; the least speed-up over one by one."""

    clients: int
    questions: int
    must: float | None = None

    @property
    def id(self) -> str:
        return f"relay-{self.clients}-clients-{self.questions}"

    @property
    def shape(self) -> str:
        return f"{self.questions} questions, {self.clients} clients"


def cases(full: bool) -> list[Case]:
    return [Case(32, 64, 3.0), Case(1, 16), Case(200, 200)] if full else [Case(4, 8)]


@contextlib.contextmanager
def server(*words: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    paths = os.pathsep.join(path for path in (str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH")) if path)
    command = [sys.executable, "-m", "recmas", "serve", str(RELAY), "--name", "relay", "--port", "0", *words]
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found is not None
            yield found[0]
        finally:
            process.terminate()
            process.wait()


class Load:
    """Clients that ask all questions of a server, each one after another; `seconds` of the requests of every call."""

    def __init__(self, at: str, clients: int, rows: list[dict[str, Any]]) -> None:
        self._at, self._clients, self._rows = at, clients, rows
        self.seconds: list[list[float]] = []

    def __call__(self) -> list[str]:
        texts, took = asyncio.run(self._ask())
        self.seconds.append(took)
        return texts

    async def _ask(self) -> tuple[list[str], list[float]]:
        texts, took, left = [""] * len(self._rows), [0.0] * len(self._rows), iter(range(len(self._rows)))

        async def work(client: Any) -> None:
            for number in left:
                begun = time.perf_counter()
                fields = dict(self._rows[number])
                question = fields.pop("question")
                answer = await client.chat.completions.create(
                    model="relay", messages=[{"role": "user", "content": question}], extra_body={"fields": fields}
                )
                texts[number] += answer.choices[0].message.content  # one that was answered twice would be twice as long
                took[number] = time.perf_counter() - begun

        async with openai.AsyncOpenAI(base_url=f"{self._at}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(work(client) for _ in range(self._clients)))
        return texts, took


def test_serving(case: Case, bench: Bench) -> None:
    lines = (RELAY / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    local = RecursiveMAS.from_pretrained(RELAY)
    prompts = [text for one in local.settings.values() for text in (one.prompt.first, one.prompt.later) if text]
    read = {name for text in prompts for name in Template(text).fields}
    rows = [json.loads(lines[number % len(lines)]) for number in range(case.questions)]
    rows = [{name: value for name, value in row.items() if name in read} for row in rows]
    expected = [answer.text for answer in local.answer(rows)]
    with server() as batched, server("--batch-rows", "1") as single:
        loads = {FUSED: Load(batched, case.clients, rows), ONE_BY_ONE: Load(single, case.clients, rows)}
        for load in loads.values():
            assert load() == expected
            load.seconds.clear()
        extra: dict[str, Any] = {"clients": case.clients}

        def settle(samples: Samples) -> Samples:
            """Add what requests took, those of calls that only warmed up, too."""
            for name, load in loads.items():
                took = np.asarray(load.seconds) * 1e3
                rate = case.questions / float(np.median(samples[name]))
                quantiles = {f"p{part}": round(float(np.percentile(took, part)), 1) for part in (50, 95)}
                extra[name] = {"requests_per_second": round(rate, 1), "milliseconds": quantiles}
            return samples

        bench.run(
            Labels("serving", "relay", case.shape, torch.float32, "request", case.questions),
            dict(loads),
            floors.Work(0, 0),
            {},
            None if case.must is None else Goal(case.must, peer=ONE_BY_ONE),
            rounds=ROUNDS,
            weighed=(),
            twice=None,
            bound=BOUND,
            settle=settle,
            extra=extra,
        )
