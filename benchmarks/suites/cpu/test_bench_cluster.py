"""Agents in processes of their own: against one process, and several micro-batches at once against one at a time.

Every process computes with one thread. On the relay lab, questions go in batches of 64, once as many batches as there
are and once a single one, beside "local", one process with all threads. The mixtures say what pipelining gains on two
cores. Four equal agents: their stage of three keeps both cores busy by itself, so one micro-batch at a time takes
3 / 2 + 1 visits and a full pipeline 4 / 2, 1.25 times less at most. Equal stages: the last agent has as much work as
the three before it together, 1 / 2 + 1 against 1. With the 9 micro-batches here, whose first must reach the last
agent, at most 9 * 1.5 / 9.5 = 1.42. Micro-batches of 32 rows let a step compute for most of its time. With 8 rows it
waits for weights, which two cores fetch together no faster than one, and a pipeline gains a tenth less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import random_agent
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from benchmarks.harness.timing import Call
from recmas import MIXTURE, RecursiveMAS
from recmas.config.system_json import PlacementSpec

pytest.importorskip("ray", reason="ray is not installed")

from recmas.distributed.cluster import cluster
from recmas.distributed.order import Loading
from recmas.distributed.system import RaySystem

pytestmark = pytest.mark.runtime

RELAY = Path(__file__).parents[3] / "examples" / "relay"
LOCAL, ONE_BY_ONE = "local", "one micro-batch at a time"
ONE_THREAD = PlacementSpec(threads=1)
ROUNDS = 4
BOUND = TimeBound(call_seconds=10.0, all_seconds=20.0)


@dataclass(frozen=True)
class Case:
    """So many questions, in micro-batches; a peer, and the least speed-up over it."""

    op: str
    questions: int
    micro_batch: int
    peer: str
    must: float | None = None

    @property
    def id(self) -> str:
        return f"{self.op}-{self.questions}-{self.micro_batch}".replace(" ", "-")

    @property
    def shape(self) -> str:
        return f"{self.questions} questions, {self.micro_batch} at once"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case("relay", 8, 4, LOCAL)]
    return [
        Case("relay", 512, 64, LOCAL, 0.87),
        Case("relay", 64, 64, LOCAL),
        Case("mixture of equal agents", 288, 32, ONE_BY_ONE),
        Case("mixture of equal stages", 288, 32, ONE_BY_ONE, 1.3),
    ]


def relay(questions: int) -> tuple[RecursiveMAS, list[dict[str, Any]]]:
    lines = (RELAY / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[number % len(lines)]) for number in range(questions)]
    return RecursiveMAS.from_pretrained(RELAY), rows


def mixture(layers: tuple[int, ...], questions: int) -> tuple[RecursiveMAS, list[dict[str, Any]]]:
    """A mixture whose agents have so many layers, in the order of its roles."""
    models = zip(MIXTURE.roles, layers, strict=True)
    agents = {role: random_agent(count, 256, 2000, seed) for seed, (role, count) in enumerate(models)}
    system = RecursiveMAS.create(agents, MIXTURE, rounds=1, latent_steps=8, seed=0)
    for setting in system.settings.values():
        setting.decoding.max_new_tokens = 8
    return system, [{"question": " ".join(f"w{number + word}" for word in range(64))} for number in range(questions)]


SYSTEMS: dict[str, Callable[[int], tuple[RecursiveMAS, list[dict[str, Any]]]]] = {
    "relay": relay,
    "mixture of equal agents": partial(mixture, (4, 4, 4, 4)),
    "mixture of equal stages": partial(mixture, (3, 3, 3, 6)),
}


def test_cluster(case: Case, bench: Bench, tmp_path: Path) -> None:
    local, rows = SYSTEMS[case.op](case.questions)
    for setting in local.settings.values():
        setting.placement = ONE_THREAD
    local.save_pretrained(tmp_path / "system")
    with cluster(), RaySystem(Loading(folder=str(tmp_path / "system")), micro_batch=case.micro_batch) as system:
        several = system.in_flight

        def ask(in_flight: int) -> list[str]:
            system.in_flight = in_flight
            return [answer.text for answer in system.answer(rows)]

        def ask_here() -> list[str]:
            return [answer.text for answer in local.answer(rows, batch_size=case.micro_batch)]

        assert ask(several) == ask(1) == ask_here()
        variants: dict[str, Call] = {FUSED: lambda: ask(several), ONE_BY_ONE: lambda: ask(1)}
        if case.op == "relay":
            variants[LOCAL] = ask_here
        bench.run(
            Labels("cluster", case.op, case.shape, torch.float32, "answer", case.questions),
            {FUSED: lambda: ask(several), ONE_BY_ONE: lambda: ask(1)}
            | ({LOCAL: ask_here} if case.op == "relay" else {}),
            floors.Work(0, 0),
            {},
            None if case.must is None else Goal(case.must, peer=case.peer),
            rounds=ROUNDS,
            weighed=(),
            twice=None,
            bound=BOUND,
        )
