"""`benchmarks.lists`: what its record keeps, and verdicts that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lists
from benchmarks.lists import TERSE, main, page
from benchmarks.report import lists as judges
from benchmarks.report.__main__ import ROOT
from benchmarks.report.claims import FAILS, HOLDS, UNTOLD
from benchmarks.report.stored import RESULTS
from tests.runtime.lab.few_steps import list_lab

RELAY = Path(__file__).parents[2] / "examples" / "relay"


def test_answers_of_labs_gather_and_times_stand_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(lists, "BATCHES", batches := (1, 2))
    monkeypatch.setattr(lists, "LEAST", 2)
    record, lab = tmp_path / "record.json", list_lab(tmp_path / "lab")
    for _ in range(2):  # a lab's answers are kept once
        assert main([str(record), "answers", str(lab), "--questions", "4"]) == 0
    assert main([str(record), "times", str(lab), "--turns", "2", "--threads", "1"]) == 0
    kept = json.loads(record.read_text())
    assert [cell["way"] for cell in kept["answers"]["cells"]] == ["text", "latent", "shuffled"]
    for cell in kept["answers"]["cells"]:
        assert (cell["seed"], cell["link_seed"], len(cell["correct"])) == (3, 3, 4)
        assert cell["latent_steps"] == (0 if cell["way"] == "text" else 40)
    assert {(cell["batch"], cell["way"]) for cell in kept["times"]["cells"]} == {
        (batch, way) for batch in batches for way in ("text", "latent", TERSE)
    }
    assert all(len(cell["seconds"]) == 2 for cell in kept["times"]["cells"])
    assert judges.half_the_time(kept).measured.count("1 thread:") == len(batches)
    capsys.readouterr()
    assert main([str(record), "page"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 2 + len(batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["answers", str(RELAY)], f"{RELAY}: is a lab of the task 'relay', not of 'list'"),
        (["answers"], "labs: none is named"),
        (["times", str(RELAY), str(RELAY)], "labs: one is timed, got 2"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(tmp_path / "record.json"), *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "record.json").exists()


def test_the_documentation_shows_what_the_record_holds():
    shown = (ROOT / "docs/evidence.md").read_text(encoding="utf-8").splitlines()
    for line in page(json.loads((RESULTS / "lists.json").read_text(encoding="utf-8"))):
        assert line in shown


def made(*, wrong: int, ratio: float) -> dict[str, Any]:
    """A record of four systems, whose latents miss so many of 1000 questions, and take that share of text's time."""
    ways = {"text": 0, "latent": wrong, "shuffled": 900}
    answers = [
        {"seed": seed, "link_seed": link_seed, "way": way, "correct": [0] * missed + [1] * (1000 - missed)}
        for seed, link_seed in ((1, 1), (1, 2), (2, 1), (2, 2))
        for way, missed in ways.items()
    ]
    seconds = {"text": 1.0, "latent": ratio, TERSE: 0.5}
    times = [{"threads": 1, "batch": 1, "way": way, "seconds": [each, 1.01 * each]} for way, each in seconds.items()]
    return {"answers": {"cells": answers}, "times": {"cells": times}}


def test_verdicts_follow_from_the_intervals():
    for wrong, verdict in ((0, HOLDS), (2, HOLDS), (10, UNTOLD), (40, FAILS)):
        assert judges.as_accurate(made(wrong=wrong, ratio=1.0)).verdict == verdict
    for ratio, verdict in ((0.45, HOLDS), (0.51, FAILS), (0.8, FAILS)):
        assert judges.half_the_time(made(wrong=0, ratio=ratio)).verdict == verdict
