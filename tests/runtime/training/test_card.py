"""The model card of a trained system: what it says, and that it never replaces a person's file."""

from __future__ import annotations

import json

import pytest

from recmas.cli import main
from recmas.training.run_record import RUN
from recmas.training.step_log import LOG
from tests.runtime.lean import write_lean

QUICK = ["--data", "rows.jsonl", "--steps", "2", "--batch-size", "2", "--rounds", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_lean(tmp_path)


def test_the_card_says_what_was_trained_on_what_and_how_well(place, capsys):
    options = ["--learning-rate", "0.01", "--validation", "rows.jsonl"]
    assert main(["train", "inner", "system", *QUICK, *options]) == 0
    first = (place / "system" / "README.md").read_text()
    assert "| `inner-planner` | 2 | " in first
    assert "outer`" not in first.partition("## Training")[2]
    assert main(["train", "outer", "system", *QUICK, "--round-weights", "2"]) == 0
    card = (place / "system" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: recmas\n")
    assert "# A recursive multi-agent system: planner > critic > solver" in card
    log = [json.loads(line) for line in (place / "system/training/outer/log.jsonl").read_text().splitlines()]
    assert f"| `outer` | 2 | {log[0]['loss']:.4f} | {log[1]['loss']:.4f} |  |" in card
    log = [json.loads(line) for line in (place / "system/training/inner-critic/log.jsonl").read_text().splitlines()]
    assert f"| {log[-1]['validation']:.4f} (step 2) |" in card
    assert (
        "- `outer`: steps 2, batch_size 2, accumulation 1, learning_rate 0.0001, rounds 1, round_weights [2.0]" in card
    )
    assert "- `inner-planner`: steps 2, batch_size 2, accumulation 1, learning_rate 0.01\n" in card
    data = json.loads((place / "system/training/outer" / RUN).read_text())["data"]
    assert f"| rows.jsonl | 12 | {data['sha256']} |" in card
    assert "## Versions\n\nrecmas " in card
    assert "stays as it is" not in capsys.readouterr().err


def test_runs_that_the_card_cannot_tell_of_are_named_before_the_first_step(place, capsys):
    assert main(["train", "inner", "system", *QUICK, "--roles", "critic"]) == 0
    folder = place / "system" / "training"
    path, log = folder / "inner-critic" / RUN, folder / "inner-critic" / LOG
    whole, steps = path.read_text(), log.read_text()
    capsys.readouterr()

    def refused(file, why):
        assert main(["train", "warmup", "system", *QUICK, "--edges", "planner->critic"]) == 2
        assert capsys.readouterr().err == f"recmas: error: system/training/inner-critic/{file}{why}\n"
        assert [each.name for each in folder.glob("warmup*")] == []

    for part, damaged in (
        ("data", {}),
        ("data", None),
        ("validation", {}),
        ("settings", {"stage": "PoetConfig"}),
        ("settings", {"stage": []}),
        ("settings", []),
        ("versions", None),
    ):
        path.write_text(json.dumps(json.loads(whole) | {part: damaged}))
        refused(RUN, ": does not say what the run was begun with")
    path.write_text(whole)
    log.write_text("{}\n")
    refused(LOG, ", line 1: not a record of a training step")
    log.write_text(steps)
    assert main(["train", "warmup", "system", *QUICK, "--edges", "planner->critic"]) == 0


@pytest.mark.parametrize("kind", ["written", "changed", "link", "folder"])
def test_a_persons_file_stays(place, capsys, kind):
    card = place / "system" / "README.md"
    if kind == "changed":
        assert main(["train", "inner", "system", *QUICK]) == 0
        card.write_text(card.read_text().replace("frozen", "very frozen"))
    elif kind == "link":
        (place / "mine.md").write_text("mine")
        card.symlink_to(place / "mine.md")
    elif kind == "folder":
        card.mkdir()
    else:
        card.write_text("mine")
    before = None if kind == "folder" else card.read_text()
    assert main(["train", "warmup", "system", *QUICK]) == 0
    assert "system/README.md is not what recmas train wrote, and stays as it is\n" in capsys.readouterr().err
    assert card.is_dir() if kind == "folder" else card.read_text() == before
    assert card.is_symlink() == (kind == "link")
