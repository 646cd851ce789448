"""The measurements on the notes task, on models that are small enough for a test."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.trio.__main__ import main
from benchmarks.trio.cells import TURNS, Cell, turns
from recmas.answering.answers import Answer, Answers
from recmas.config.system_json import Decoding
from tests.runtime.tiny import tiny_agent

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("large", "small")):
        agent = tiny_agent("llama", name, 32 + 8 * seed, seed)
        agent.model.config.max_position_embeddings = 4096
        agent.save_pretrained(folder / name)
    return folder


def call(models, step, *options):
    return main([str(models), str(models / "record.json"), step, "large", "small", *options])


def test_links_audit_and_time(models, monkeypatch, capsys):
    assert call(models, "audit") == 2
    assert "no links there; the step 'links' trains them" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.trio.links.HELD", 2)
    # A vocabulary of one corpus: few words are one token.
    monkeypatch.setattr("benchmarks.trio.links.copies", lambda words, seed, count: short(words, seed, count))
    assert call(models, "links", "--lists", "4", "--steps", "2") == 0
    record = json.loads((models / "record.json").read_text())["large-small"]
    assert set(record["links"]["held out"]) == {"word lists", "known", "unknown"}
    for found in record["links"]["held out"].values():
        assert all(-1 <= value <= 1 for value in found.values())
    monkeypatch.setattr("benchmarks.trio.__main__.CELLS", (Cell(1, 3, ("text",)), Cell(2, 3, ())))
    assert call(models, "audit", "--questions", "7", "--seconds", "0") == 0
    assert json.loads((models / "record.json").read_text())["large-small"]["audit"] == []
    for _ in range(2):  # the second call finds all cells done
        assert call(models, "audit", "--questions", "7") == 0
    record = json.loads((models / "record.json").read_text())["large-small"]
    assert [(one["arm"], one["steps"], one["tokens"]) for one in record["audit"]] == [
        *[("trained", 1, 0), ("shuffled", 1, 0), ("text", 0, 3)],
        *[("trained", 2, 0), ("shuffled", 2, 0)],
    ]
    assert all(len(one["correct"]) == len(one["nll"]) == 7 for one in record["audit"])
    ways = {name: way | {"tokens": 2} for name, way in list(TURNS.items())[1:3]}
    monkeypatch.setattr("benchmarks.trio.cells.TURNS", ways)
    assert call(models, "time", "--questions", "2", "--rounds", "1") == 0
    record = json.loads((models / "record.json").read_text())["large-small"]
    assert [(one["way"], one["batch"]) for one in record["time"]] == [(way, batch) for batch in (1, 8) for way in ways]


def test_page(models, tmp_path, capsys):
    arms = [("text", 0, 32, 7), ("trained", 8, 0, 4), ("shuffled", 8, 0, 0)]
    audits = [
        {
            "arm": arm,
            "steps": steps,
            "tokens": tokens,
            "hops": 1,
            "correct": [n < right for n in range(8)],
            "nll": [8.0 - right] * 8,
        }
        for arm, steps, tokens, right in arms
    ]
    times = [
        {
            "way": way,
            "batch": 1,
            "questions": 4,
            "tokens": 9.0,
            "seconds": t,
            "range": [t, t],
            "reader seconds": t,
            "reader range": [t, t],
        }
        for way, t in (("text, 32 tokens", 2.0), ("latents, m = 8", 0.5))
    ]
    links = {"held out": {"known": {"inner cosine": 0.5}}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"a-b": {"links": links, "audit": audits, "time": times}}))
    assert main([str(models), str(path), "page", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| known | 0.50 |" in lines
    text, latents, shuffled = (line for line in lines if "| 8 |" in line)
    assert text.startswith("| text, 32 tokens | 8 | 0.88 [")
    assert text.endswith("| 1.00 | 0.75 | 1.00 |  |  |")
    assert latents.startswith("| latents, m = 8 | 8 | 0.50 [")
    assert "| 0.50 | 0.50 | 4.00 | -0.38 [" in latents
    assert "p = 0.25 | +3.00 [+3.00, +3.00] |" in latents
    assert "p = 0.016 |" in shuffled
    assert lines[-1] == "| 1 | latents, m = 8 | 9 | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.25 |"
    assert main([str(models), str(path), "page", "b", "a"]) == 2
    assert "nothing of b-a" in capsys.readouterr().err


def test_the_evidence_shows_what_the_record_holds(capsys):
    assert main(["models", str(ROOT / "benchmarks/results/trio.json"), "page", "qwen", "smollm2"]) == 0
    printed = [cells(line) for line in capsys.readouterr().out.splitlines()]
    printed = {line[0]: line[:1] + line[2:] for line in printed if len(line) == 8}  # without the number of questions
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8").replace("−", "-")
    shown = {line[0]: line for line in map(cells, text.splitlines()) if len(line) == 7 and line[0] in printed}
    assert len(shown) == 2 + 13
    for name, line in shown.items():
        assert line == printed[name]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def short(words, seed, count):
    from recmas.lab.copies import copies

    return copies(words, seed, count, length=3)


def test_times_are_medians_of_turns():
    def answer(rows, **options):
        asked.append(options)
        answers = Answers(Answer(text_tokens={"reader": 5}) for _ in rows)
        answers.seconds["round 1, reader"] = 1.0
        return answers

    settings = {"reader": SimpleNamespace(decoding=Decoding())}
    asked = []
    ticks = itertools.accumulate(itertools.cycle([0.0, 2.0]))
    found = list(turns(SimpleNamespace(answer=answer, settings=settings), 4, 2, 3, clock=lambda: next(ticks)))
    assert len(asked) == 4 * len(TURNS)
    assert [options.get("latent_steps") for options in asked[:4]] == [None, None, 8, 32]
    assert {one["seconds"] for one in found} == {0.5}
    assert {one["tokens"] for one in found} == {5.0}


def test_a_missing_model_is_named(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "r.json"), "links", "a", "b"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'}: no model there\n"
