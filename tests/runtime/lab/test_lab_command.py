"""`recmas lab` from the outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recmas.cli import main
from recmas.lab.grid import Measurement, heading, line, summary
from recmas.lab.tasks import RELAY
from recmas.lab.world import questions
from recmas.prompts.jsonl import read_rows

SHIPPED = str(Path(__file__).parents[3] / "examples" / "relay")


def test_questions_are_the_test_worlds_of_their_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.jsonl"
    assert main(["lab", "questions", str(path), "--seed", "5", "--count", "7", "--hops", "1,3"]) == 0
    assert read_rows(path) == questions("test", 5, (1, 3), 7)
    assert capsys.readouterr().out == f"7 questions in {path}\n"


@pytest.mark.parametrize("task", ["eval", "demo"])
def test_a_system_that_is_no_relay_lab_is_refused(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = tmp_path / "other"
    shutil.copytree(SHIPPED, system)
    spec = system / "system.json"
    spec.write_text(spec.read_text().replace("{{critic_sheet}}", "{{question}}"))
    assert main(["lab", task, str(system), "--questions", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("recmas: error: system: is no lab; expected planner, critic and solver")
    assert printed.err.count("\n") == 1


def test_eval_measures_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "eval", SHIPPED, "--questions", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    cells = json.loads(printed.out)
    assert len(cells) == 39
    assert {cell["questions"] for cell in cells} == {2}
    assert {cell["rounds"] for cell in cells if cell["method"] == "solver alone"} == {0}


def test_build_says_what_came_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "pretraining": {"planner": {"steps": 900, "accuracy": 0.999}},
        "links": {"validation": {"warmup": 0.9, "one round": 0.95}, "kept": "one round"},
        "validation_accuracy": 0.949,
    }
    asked: list[object] = []

    def build(*arguments: object, **options: object) -> dict[str, object]:
        asked.extend((*arguments, options))
        return record

    monkeypatch.setattr("recmas.lab.build.build", build)
    assert main(["lab", "build", "new", "--seed", "4", "--link-seed", "5", "--agents", SHIPPED]) == 0
    assert asked == ["new", 4, {"task": RELAY, "link_seed": 5, "agents": SHIPPED}]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "planner: 0.999 of its look-ups right after 900 steps"
    assert lines[-2] == "kept: one round; as stored 0.9490"
    assert lines[-1].startswith("new written in ")
    assert main(["lab", "build", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record


def test_the_grid_as_text() -> None:
    cells = [
        Measurement("latent", 1, 1, 8, 0.875, 0.125, 4.0, 4.0, 0.0015),
        Measurement("solver alone", 1, 0, 8, 0.125, 0.125, 4.0, 0.0, 0.0005),
        Measurement("latent", 2, 1, 8, 0.25, 0.125, 4.0, 4.0, 0.0015),
        Measurement("solver alone", 2, 0, 8, 0.0, 0.25, 4.0, 0.0, 0.0005),
    ]
    assert line(cells[0]).split() == ["1", "1", "latent", "0.875", "0.125", "4.0", "4.0", "1.50"]
    assert line(cells[1]).split()[:4] == ["1", "-", "solver", "alone"]
    assert len({len(heading()), *(len(line(cell)) for cell in cells)}) == 1
    first, *rows = summary(cells).splitlines()
    assert first.split("  ")[-2:] == ["latent r=1", "solver alone"]
    assert [row.split() for row in rows] == [["1", "hop", "0.875", "0.125"], ["2", "hops", "0.250", "0.000"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "nowhere/system.json: no such file; nowhere is not a system"),
        (
            ["eval", SHIPPED, "--questions", "1"],
            "--questions: 1 is too few; latents are shuffled among 2 questions or more",
        ),
        (
            ["eval", SHIPPED, "--questions", "0"],
            "--questions: 0 is too few; latents are shuffled among 2 questions or more",
        ),
        (["questions", "q.jsonl", "--hops", "9"], "hops must be between 0 and 4, got 9"),
        (["questions", "q.jsonl", "--count", "0"], "--count: 0 is not positive"),
        (["build", "."], ".: exists and is not a system; nothing was written"),
        (["questions", "q.jsonl", "--task", "chess"], "task: 'chess' is none of relay, list"),
        (["questions", "q.jsonl", "--task", "list", "--hops", "1,2"], "hops must be 1 in questions of lists, got 2"),
        (
            ["build", "new", "--task", "list", "--agents", SHIPPED],
            f"agents: {SHIPPED} is a lab of the task 'relay', not of 'list'",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line for line in printed.err.splitlines() if line.startswith("recmas")] == [f"recmas: error: {message}"]
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
