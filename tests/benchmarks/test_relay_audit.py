"""The relay lab's audit: what is kept of it, and the table that the documentation shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.relay_audit import main
from recmas.evaluation import ARMS

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/relay_audit.json"


def test_the_page_shows_what_the_record_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECORD), "--page"]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = (ROOT / "docs/how-to/audit.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in printed if line.startswith("|")]) == 2 + len(ARMS)
    assert [line for line in printed if line and line not in shown] == []


def test_an_audit_is_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert main([str(path), "--questions", "7"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    (found,) = record["audits"]
    assert [one["arm"] for one in found["arms"]] == list(ARMS)
    assert {len(one[kept]) for one in found["arms"] for kept in ("correct", "nll")} == {7}
    assert record["questions"] == {"count": 7, "seed": 2026, "hops": [1, 2, 3]}
    assert (found["rounds"], found["link_seed"]) == (3, 1)
    whole = json.loads(RECORD.read_text())
    assert len({one["link_seed"] for one in whole["audits"]}) >= 5
    for one, all_of_it in zip(found["arms"], whole["audits"][0]["arms"], strict=True):
        if one["arm"] in ("trained", "text"):  # they are sure of their answers
            assert one["correct"] == all_of_it["correct"][:7], one["arm"]
            assert one["nll"] == pytest.approx(all_of_it["nll"][:7], abs=0.05), one["arm"]
    assert main([str(path), "--page"]) == 0
    assert capsys.readouterr().out == printed


def test_few_questions_or_no_record_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert main([str(path), "--questions", "6"]) == 2
    assert capsys.readouterr().err.startswith("error: questions: 6 are too few")
    assert main([str(path), "--page"]) == 2
    assert str(path) in capsys.readouterr().err
    assert not path.exists()
