"""Metrics, intervals, pass@k, summaries, and where questions come from."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest

from recmas.evaluation import METRICS, Record, pass_at, summarize, wilson
from recmas.evaluation.data import read_data
from recmas.evaluation.metrics import check_metric
from recmas.evaluation.summary import table

RECORD = Record(
    "latent", 2, 3, 0, 0, "k", "a", "b", True, 4, 5, {"round 1, expert": 0.5, "round 1, learner": 1.5}, 3 * 2**20, 0
)


def test_wilson_interval():
    assert wilson(0, 0) == (0, 1)
    # Bounds solve |share - p| = z sqrt(p (1 - p) / n): the definition of the interval.
    for correct, questions in ((0, 10), (7, 10), (2.75, 10), (505, 512), (10, 10)):
        low, high = wilson(correct, questions)
        assert 0 <= low <= correct / questions <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                deviation = 1.959963984540054 * (bound * (1 - bound) / questions) ** 0.5
                assert abs(correct / questions - bound) == pytest.approx(deviation)


def test_pass_at_counts_the_choices_that_hold_a_correct_answer():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                chosen = list(combinations([True] * correct + [False] * (samples - correct), k))
                assert pass_at(k, samples, correct) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_at(10, 2000, 1) == pytest.approx(10 / 2000)
    for k, samples, correct in ((0, 3, 1), (4, 3, 1), (1, 3, 4), (1, 3, -1)):
        with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
            pass_at(k, samples, correct)


def test_summary():
    # Question 0: 1 of 3 samples correct; question 1: all of them.
    verdicts = [(0, True), (0, False), (0, False), (1, True), (1, True), (1, True)]
    records = [
        replace(RECORD, index=index, sample=number % 3, correct=correct, latent_steps=number, peak_memory=number)
        for number, (index, correct) in enumerate(verdicts)
    ]
    summary = summarize(records)
    assert (summary.mode, summary.rounds, summary.steps) == ("latent", 2, 3)
    assert (summary.questions, summary.samples, summary.correct) == (2, 3, 4)
    assert summary.accuracy.value == pytest.approx(2 / 3)
    assert (summary.accuracy.low, summary.accuracy.high) == pytest.approx(wilson(4 / 3, 2))
    assert {k: share.value for k, share in summary.pass_at.items()} == pytest.approx({2: (2 / 3 + 1) / 2, 3: 1})
    assert (summary.text_tokens, summary.latent_steps, summary.seconds) == (4, 2.5, pytest.approx(2))
    assert summary.stages == pytest.approx({"round 1, expert": 0.5, "round 1, learner": 1.5})
    assert summary.peak_memory == 5
    assert summarize([RECORD]).pass_at == {}
    with pytest.raises(ValueError, match="expected those of one cell"):
        summarize([RECORD, replace(RECORD, rounds=3)])
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_table():
    cells = [summarize([RECORD]), summarize([replace(RECORD, steps={"expert": 1, "learner": 12}, correct=False)])]
    head, first, second = table(cells).splitlines()
    assert head.split()[:4] == ["mode", "rounds", "steps", "questions"]
    assert first.split() == ["latent", "2", "3", "1", "1.000", "[0.207,", "1.000]", "4.0", "5.0", "0.0", "2000.0", "3"]
    assert second.split()[2] == "expert=1,learner=12"
    assert head.index("text tokens") == first.index("4.0") == second.index("4.0")


@pytest.mark.parametrize(
    ("metric", "text", "expected", "correct"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "42 dogs", "42", False),
        ("exact", "Paris.", "Paris", False),
        ("exact", "paris", "Paris", False),
        ("exact", "New  York", "New York", False),
        ("begins", " paris.\n\nNote", "Paris", True),
        ("begins", "Paris", " Paris", True),
        ("begins", "Parisian", "Paris", False),
        ("begins", "It is Paris", "Paris", False),
        ("begins", "", "Paris", False),
        ("last_word", "It is Paris.", "Paris", False),
        ("last_word", "It is paris", "Paris", False),
        ("last_word", " It is\nParis \n", "Paris", True),
        ("last_word", "0 bako", "bako", True),
        ("last_word", "0 bako", "0 bako", True),
        ("last_word", "bako 0", "bako", False),
        ("last_word", "", "bako", False),
        ("choice", "A seems right, but the answer is (C).", "C", True),
        ("choice", "so \\boxed{B}, not A", "(B)", True),
        ("choice", "D", "D", True),
        ("choice", "It is hard to tell", "A", False),
        ("choice", "Answer: B", "C", False),
    ],
)
def test_metrics(metric, text, expected, correct):
    assert METRICS[metric](text, expected) is correct


def test_math_metric():
    pytest.importorskip("math_verify")
    verdict = METRICS["math"]
    assert verdict("so the answer is \\boxed{0.5}", "\\frac{1}{2}") is True
    assert verdict("it is 42.", "42") is True
    assert verdict("it is 43.", "42") is False
    assert verdict("\\boxed{1234}", "She has 34 and earns 1200.\n#### 1,234") is True
    assert verdict("\\boxed{34}", "She has 34 and earns 1200.\n#### 1,234") is False


def test_metrics_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="metric must be one of exact, last_word, begins, choice, math, got 'vibes'"):
        check_metric("vibes")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    check_metric("exact")
    with pytest.raises(ImportError, match=r"pip install 'recmas-kernels\[eval\]'"):
        check_metric("math")


def hub(monkeypatch, rows):
    """A stand-in for `datasets`; what it was asked for."""
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_questions_of_the_hub(monkeypatch):
    asked = hub(monkeypatch, [{"problem": "1 + 1", "answer": "2"}, {"problem": "1 + 2", "answer": "3"}])
    rows = read_data("owner/name", split="train", subset="main", question_field="problem", limit=1)
    assert rows == [{"problem": "1 + 1", "question": "1 + 1", "answer": "2"}]
    assert asked == [(("owner/name", "main"), {"split": "train"})]


def test_questions_that_cannot_be_had(monkeypatch, tmp_path):
    hub(monkeypatch, [])
    with pytest.raises(ValueError, match="data set 'owner/name': split 'test' holds no rows"):
        read_data("owner/name")
    hub(monkeypatch, OSError("no such split"))
    with pytest.raises(ValueError, match="data set 'owner/name': split 'test' cannot be loaded: no such split"):
        read_data("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no file 'owner/name'.*pip install 'recmas-kernels\[eval\]'"):
        read_data("owner/name")
    for path in ("folder/rows.jsonl", "rows", "/owner/name", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            read_data(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text(json.dumps({"question": "fox"}) + "\n")
    assert read_data("owner/name") == [{"question": "fox"}]  # a file comes first
    with pytest.raises(ValueError, match="row 0: no field 'problem' with the question"):
        read_data("owner/name", question_field="problem")
