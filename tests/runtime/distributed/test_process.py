"""What runs in an agent's process, without any cluster around it."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recmas import DISTILLATION, SEQUENTIAL, AnswerOptions, Pattern, RecursiveMAS
from recmas.agents.sampling import Sampler
from recmas.answering.manner import Manner
from recmas.config.system_json import read_spec
from recmas.distributed import agent_process
from recmas.distributed.agent_process import AgentProcess
from recmas.distributed.order import Described, Loading, Order
from recmas.distributed.sealed import RefusedError, Stamp
from recmas.scheduling.row import Row
from recmas.scheduling.task import Part, Task, Work
from recmas.system.fingerprint import member_digest
from recmas.system.loading import load_member
from recmas.tools import SHIPPED, Toolbox
from tests.runtime.distributed.conftest import saved
from tests.runtime.scheduling.rows import Waiting
from tests.runtime.system.test_links_per_round import ROUNDS, per_round
from tests.runtime.tiny import tiny_agent

KEY = b"k" * 32
QUESTIONS = ["fox", "the lazy dog"]


class Pair:
    """Expert and learner, each as in a process of its own, and the learner's order of a run of one round."""

    def __init__(self, folder: Path) -> None:
        self.local: RecursiveMAS = saved(folder, DISTILLATION)
        loading, spec = Loading(folder=str(folder)), read_spec(folder)
        self.processes = {role: AgentProcess(1) for role in self.local.pattern.roles}
        self.described: Mapping[str, Described] = {
            role: process.load(loading, spec, role, "cpu", KEY) for role, process in self.processes.items()
        }
        manner = Manner(self.local.outline, AnswerOptions(rounds=1))
        parts: dict[str, list[Part]] = {"expert": [], "learner": []}
        works: dict[str, Work] = {}
        for number, question in enumerate(QUESTIONS):
            row = Row(number, {"question": question}, manner, Waiting())
            for role in parts:
                [(visit, works[role])] = row.due()
                part, _ = row.begin(visit)
                parts[role].append(part)
                row._walk.end(visit, None)  # type: ignore[arg-type]
        stamp = Stamp("system", self.described["expert"].link, "expert", 0)
        self.thinks = Order(Task(0, works["expert"], parts["expert"], {}), stamp, [], {})
        reads: dict[str, Any] = {"expert": [(0, 0), (0, 1)]}
        self.writes = Order(
            Task(1, works["learner"], parts["learner"], {}), Stamp("system", "", "learner", 1), [stamp], reads
        )


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What the tests have imported stays frozen here: every load would look through all of it again, for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_process, "gc", SimpleNamespace(**vars(gc) | {"unfreeze": lambda: None}))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair") / "system")


def test_two_processes_answer_as_one(pair: Pair) -> None:
    expected = pair.local.answer(QUESTIONS, rounds=1)
    _, message = pair.processes["expert"].run(pair.thinks)
    done, nothing = pair.processes["learner"].run(pair.writes, message)
    assert nothing == b""
    assert [done.grown[place].text for place in range(2)] == [answer.text for answer in expected]
    assert [done.grown[place].tokens for place in range(2)] == [answer.tokens for answer in expected]
    steps = list(pair.processes["learner"].stream(pair.writes, 0.0, message))
    assert len(steps) > 2
    texts = ["".join(step.grown[place].text for step in steps if place in step.grown) for place in range(2)]
    assert texts == [answer.text for answer in expected]


def test_a_text_grows_at_its_pace(pair: Pair) -> None:
    _, message = pair.processes["expert"].run(pair.thinks)
    steps = list(pair.processes["learner"].stream(pair.writes, 3600.0, message))
    whole = {place for step in steps for place in step.grown}
    assert whole == {0, 1}
    assert len(steps) <= 4  # the first step, the ends of two rows, the end


def test_all_agents_are_of_the_system_that_was_read_first(tmp_path: Path) -> None:
    """A save between the loads of two agents does not mix two systems, nor does one before a process comes back."""
    folder = tmp_path / "system"
    saved(folder, DISTILLATION)
    spec, process = read_spec(folder), AgentProcess(1)
    process.load(Loading(folder=str(folder)), spec, "expert", "cpu", KEY)
    local = RecursiveMAS.from_pretrained(folder)
    RecursiveMAS.create(local.agents, DISTILLATION, seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="no such folder|sha256"):
        process.load(Loading(folder=str(folder)), spec, "learner", "cpu", KEY)


@pytest.mark.parametrize("pattern", [SEQUENTIAL, Pattern((("a", "b"), ("c",)), combine="weighted")])
def test_an_agent_by_itself_has_the_digest_that_it_has_in_its_system(pattern: Pattern, tmp_path: Path) -> None:
    """Links of a round's own, learned weights of edges, one model in all roles."""
    agents = dict.fromkeys(pattern.roles, tiny_agent("llama", "one"))
    made = RecursiveMAS.create(agents, pattern, rounds=ROUNDS, latent_steps=2, seed=1)
    with torch.no_grad():
        for score in made.edge_scores.values():
            score.normal_(generator=torch.Generator().manual_seed(3))
    per_round(made).save_pretrained(tmp_path / "system")
    whole, spec = RecursiveMAS.from_pretrained(tmp_path / "system"), read_spec(tmp_path / "system")
    process = AgentProcess(1)
    loading = Loading(folder=str(tmp_path / "system"))
    digests = {role: process.load(loading, spec, role, "cpu", KEY).digest for role in pattern.roles}
    assert digests == {role: member_digest(whole.member(role), pattern) for role in pattern.roles}
    assert len(set(digests.values())) == 3


def test_a_message_of_another_task_is_refused(pair: Pair) -> None:
    _, message = pair.processes["expert"].run(pair.thinks)
    other = replace(pair.writes.stamps[0], task=7)
    with pytest.raises(RefusedError, match="its task is 0, not 7"):
        pair.processes["learner"].run(pair.writes._replace(stamps=[other]), message)


def test_texts_that_nobody_waits_for_are_not_written(pair: Pair) -> None:
    _, message = pair.processes["expert"].run(pair.thinks)
    process = pair.processes["learner"]
    again = pair.writes._replace(task=Task(5, pair.writes.task.work, pair.writes.task.parts, {}))
    process.drop(5, {0})
    steps = process.stream(again, 0.0, message)
    first = next(steps)
    assert first.grown.keys() == {0, 1}  # the step that was under way
    assert next(steps).grown.keys() == {1}
    process.drop(5, {1})
    process.drop(4, {0, 1})  # of a task that waits
    rest = list(steps)
    assert sum(len(step.grown) for step in rest) <= 1
    assert rest[-1].account.written[1] < 6
    process.drop(5, {0})  # it is over
    assert process._dropped.keys() == {4}
    earlier = again._replace(task=Task(4, again.task.work, again.task.parts, {}))  # what is furthest goes first
    assert sum(len(step.grown) for step in process.stream(earlier, 0.0, message)) <= 2
    process.drop(5, {0})
    assert not process._dropped


def test_the_last_agent_calls_tools_as_in_one_process(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are made to write a call; what the process is told comes through a pickle, as Ray sends it."""
    toolbox = Toolbox([SHIPPED["python"]("none")])
    words = pair.local.agents["learner"].literal("<python>print(6 * 7)</python>")

    def script() -> None:
        left = iter([*words, words[0]])
        monkeypatch.setattr(Sampler, "choose", lambda self, logits, uniform: torch.full((len(logits),), next(left)))

    script()
    expected = pair.local.answer(QUESTIONS, rounds=1, tools=toolbox, max_new_tokens=len(words) + 1)
    assert "<result> 42 </result>" in expected[0].text
    folder = tmp_path / "system"
    pair.local.save_pretrained(folder)
    process, spec = AgentProcess(1), read_spec(folder)
    process.load(pickle.loads(pickle.dumps(Loading(folder=str(folder), toolbox=toolbox))), spec, "learner", "cpu", KEY)
    _, message = pair.processes["expert"].run(pair.thinks)
    parts = [replace(part, max_new_tokens=len(words) + 1) for part in pair.writes.task.parts]
    script()
    done, _ = process.run(pair.writes._replace(task=Task(1, pair.writes.task.work, parts, {})), message)
    assert [done.grown[place].text for place in range(2)] == [answer.text for answer in expected]
    assert done.account.tool_calls == [answer.tool_calls for answer in expected]
    assert [len(calls) for calls in done.account.tool_calls] == [1, 1]


def test_garbage_of_loading_does_not_stay_with_what_is_loaded(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once frozen, no collection would find it."""

    class Circle:
        def __init__(self) -> None:
            self.itself = self

    left = []

    def load(*given: Any, **more: Any) -> Any:
        left.append(weakref.ref(Circle()))
        return load_member(*given, **more)

    folder = tmp_path / "system"
    pair.local.save_pretrained(folder)
    monkeypatch.setattr(agent_process, "load_member", load)
    gc.disable()  # or one that comes by chance finds it first
    try:
        AgentProcess(1).load(Loading(folder=str(folder)), read_spec(folder), "learner", "cpu", KEY)
    finally:
        gc.enable()
    gc.collect()
    assert [circle() for circle in left] == [None]
