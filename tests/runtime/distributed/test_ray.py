"""Agents in processes of their own answer as they do in one process, and what no cluster can do is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from recmas import DISTILLATION, SEQUENTIAL, RecursiveMAS
from recmas.answering.answers import Answer, Answers
from recmas.cli import main
from recmas.config.system_json import PlacementSpec
from recmas.distributed.order import Loading
from recmas.tools import Toolbox
from recmas.tools.python import PythonTool
from tests.runtime.distributed.conftest import saved
from tests.runtime.scheduling.rows import PATTERNS, QUESTIONS

if TYPE_CHECKING:
    from recmas.distributed.system import RaySystem


@pytest.mark.usefixtures("pooled")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_one_process(pattern: str, tmp_path: Path) -> None:
    from recmas.distributed.system import RaySystem

    local = saved(tmp_path / "system", PATTERNS[pattern])
    with RaySystem(Loading(folder=str(tmp_path / "system"))) as system:
        assert system.fingerprint() == local.fingerprint()
        check_alike(local, system, batch_size=6)
        check_alike(local, system, batch_size=2)
        check_alike(local, system, batch_size=3, mode="text")
        check_alike(local, system, temperature=0.7, seed=5, rounds=1, latent_steps=2)
        assert (system.executor.refused, system.executor.restarts) == (0, 0)


def check_alike(local: RecursiveMAS, system: RaySystem, **options: Any) -> None:
    """Both give the same answers, and tell of texts, answers and visits what happened."""
    told: dict[int, Answer] = {}
    pieces = dict.fromkeys(range(len(QUESTIONS)), "")
    visits: list[int] = []

    def tell(numbers: Sequence[int], answers: Answers) -> None:
        told.update(zip(numbers, answers, strict=True))

    def show(number: int, piece: str) -> None:
        pieces[number] += piece

    expected = local.answer(QUESTIONS, **options)
    found = system.answer(QUESTIONS, **options, on_answers=tell, on_text=show, progress=visits.append)
    assert [vars(answer) for answer in found] == [vars(answer) for answer in expected]
    assert [told[number] for number in range(len(QUESTIONS))] == list(found)
    assert list(pieces.values()) == [answer.text for answer in expected]
    assert sum(visits) == len(QUESTIONS) * len(list(local.pattern.visits(options.get("rounds", 2))))
    assert found.seconds.keys() == expected.seconds.keys()


@pytest.fixture
def sequential(tmp_path: Path) -> tuple[RecursiveMAS, Path]:
    return saved(tmp_path / "system", SEQUENTIAL), tmp_path / "system"


@pytest.mark.usefixtures("pooled")
def test_the_command_line_answers_and_measures_alike(
    sequential: tuple[RecursiveMAS, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = sequential
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": question, "answer": "x"}) + "\n" for question in QUESTIONS))

    def said(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    run = ["run", str(folder), "--questions", str(rows)]
    output = ["--output", str(tmp_path / "answers.jsonl")]
    expected = said(*run)["answers"]
    assert said(*run, "--engine", "ray", "--micro-batch", "2", *output)["answers"] == expected
    assert said(*run, *output)["answers"] == expected  # a run of one engine goes on with the other
    assert main([*run, "--engine", "ray"]) == 0
    nothing = "0 handoffs refused, 0 agents restarted, 0 batches repeated"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" s, {nothing}")
    records = tmp_path / "records.jsonl"
    measure = ["eval", str(folder), "--data", str(rows), "--mode", "latent,text", "--output", str(records)]
    assert main([*measure, "--engine", "ray"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == nothing
    by_ray = [json.loads(line) for line in records.read_text().splitlines()]
    records.unlink()
    said(*measure)
    by_one = [json.loads(line) for line in records.read_text().splitlines()]
    for record in by_ray + by_one:
        del record["seconds"], record["peak_memory"]
    assert by_ray == by_one


def script(process: Any, words: list[int]) -> None:
    """In this process every text consists of these tokens from now on; runs there, as part of an agent's process."""
    import torch

    from recmas.agents.sampling import Sampler

    left, Sampler.honest = iter(words), Sampler.choose  # type: ignore[attr-defined]
    Sampler.choose = lambda self, logits, uniform: torch.full((len(logits),), next(left))  # type: ignore[method-assign]


def unscript(process: Any) -> None:
    """The end of `script`."""
    from recmas.agents.sampling import Sampler

    Sampler.choose = Sampler.honest  # type: ignore[attr-defined, method-assign]


@pytest.mark.usefixtures("pooled")
def test_tools_run_with_the_last_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its process, not in that which asks; what it reads of them is what it reads in one process."""
    import ray
    from ray import cloudpickle

    from recmas.distributed.system import RaySystem

    local = saved(tmp_path / "system", DISTILLATION)
    toolbox = Toolbox([PythonTool()])
    words = local.agents["learner"].literal("<python>print(6 * 7)</python>")
    words = [*words, words[0]]
    options: dict[str, Any] = {"rounds": 1, "tools": toolbox, "max_new_tokens": len(words)}
    script(None, words)
    try:
        expected = local.answer(["fox", "plan"], **options)
    finally:
        unscript(None)
    assert [call.result for call in expected[0].tool_calls] == ["42"]

    def run(self: Any, text: str) -> str:
        raise AssertionError("a program ran here")

    monkeypatch.setattr(PythonTool, "run", run)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with RaySystem(Loading(folder=str(tmp_path / "system"), toolbox=toolbox)) as cluster:
        [learner] = cluster.executor._replicas["learner"]
        try:
            ray.get(learner._process.__ray_call__.remote(script, words))
            found = cluster.answer(["fox", "plan"], **options)
        finally:
            ray.get(learner._process.__ray_call__.remote(unscript))
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert [vars(answer) for answer in found] == [vars(answer) for answer in expected]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (PlacementSpec(cpus=1000), "placement: no machine of the cluster has 1000 CPU, which agent 'planner' asks for"),
        (PlacementSpec(resources={"moon": 0.5}), "placement: no machine of the cluster has 0.5 moon, which"),
        (PlacementSpec(cpus=1, replicas=200), "placement: all agents ask for 600 CPU, the cluster has "),
    ],
)
def test_a_placement_that_no_cluster_satisfies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], placement: PlacementSpec, message: str
) -> None:
    saved(tmp_path / "system", SEQUENTIAL, placement)
    refused(capsys, message, "run", str(tmp_path / "system"), "--question", "fox", "--engine", "ray")
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    refused(capsys, message, "serve", str(tmp_path / "system"), "--port", "0", "--engine", "ray")


@pytest.mark.usefixtures("pooled")
def test_what_the_engine_cannot_do_is_one_line(
    sequential: tuple[RecursiveMAS, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = sequential
    ask = ["run", str(folder), "--question", "fox", "--engine", "ray"]
    (tmp_path / "rows.jsonl").write_text('{"question": "fox", "answer": "x"}\n')
    measure = ["eval", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--engine", "ray"]
    refused(capsys, "batch_size: 'auto' measures the memory of one process", *ask, "--batch-size", "auto")
    refused(capsys, "mode: 'single' is one agent by itself", *measure, "--mode", "single")
    refused(capsys, "row 0: agent 'planner': the prompt takes", *ask[:3], "fox " * 200, *ask[4:])
    weights = folder / "agents" / "critic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, "critic", *ask)


def refused(capsys: pytest.CaptureFixture[str], message: str, *words: str) -> None:
    capsys.readouterr()  # what was said before
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    assert message in err
