"""Metrics, intervals and the record file of an evaluation, mostly on a stand-in that writes what the row says."""

import json
import sys

import pytest
import torch
from torch import nn

from recmas import RecursiveMAS
from recmas.evaluation import METRICS, evaluate, summarize, wilson
from recmas.pattern import DISTILLATION
from recmas.running import Answer, Answers
from tests.runtime.tiny import tiny_agent


class Echo:
    """Answers a row with its "says"; counts the rows it was asked, and can break down at one of them."""

    def __init__(self):
        self.pattern, self.agents, self.settings, self.defaults = DISTILLATION, {}, {}, None
        torch.manual_seed(0)
        self.inner_links = {"expert": nn.Linear(2, 2)}
        self.outer_links = {("expert", "learner"): nn.Linear(2, 2)}
        self.edge_scores = {}
        self.calls = []
        self.breaks_at = None

    def answer(self, rows, **options):
        self.calls.append((rows, options))
        if any(row["says"] == self.breaks_at for row in rows):
            raise KeyboardInterrupt
        steps = {"expert": 3, "learner": 2}
        answers = Answers(Answer(row["says"], [1], steps, {"learner": 4}) for row in rows)
        answers.seconds["round 1, expert"] = 0.5 * len(rows)
        answers.seconds["round 1, learner"] = 1.5 * len(rows)
        return answers


ROWS = [{"says": f"{n} bako", "answer": "bako" if n % 3 else "dilo"} for n in range(10)]


def run(system, rows=ROWS, **options):
    return evaluate(system, rows, **{"metric": "last_word", "batch_size": 4, "progress": False, **options})


def test_records_and_summary():
    records, summary = run(Echo())
    assert [record.index for record in records] == list(range(10))
    assert [record.correct for record in records] == [n % 3 != 0 for n in range(10)]
    assert (records[3].text, records[3].expected) == ("3 bako", "dilo")
    assert (summary.questions, summary.correct, summary.accuracy) == (10, 6, 0.6)
    assert (summary.text_tokens, summary.latent_steps, summary.seconds) == (4, 5, pytest.approx(2))
    assert (summary.low, summary.high) == wilson(6, 10)


def test_options_reach_the_system_and_each_batch_has_its_seed():
    system = Echo()
    run(system, mode="text", rounds=2, latent_steps={"expert": 1}, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    assert [len(rows) for rows, _ in system.calls] == [4, 4, 2]
    assert [options.pop("seed") for _, options in system.calls] == [3, 7, 11]
    expected = {
        "mode": "text",
        "rounds": 2,
        "latent_steps": {"expert": 1},
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "batch_size": 4,
    }
    assert all(options == expected for _, options in system.calls)


def test_a_broken_off_evaluation_goes_on_without_repeating_or_losing_a_question(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    system = Echo()
    system.breaks_at = "5 bako"
    with pytest.raises(KeyboardInterrupt):
        run(system, output=path)
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as file:
        file.write('{"index": 4, "key": "cut sh')
    system = Echo()
    resumed = run(system, output=path)
    assert [len(rows) for rows, _ in system.calls] == [4, 2]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    whole = run(Echo())
    assert resumed == whole
    system = Echo()
    assert run(system, output=path) == whole
    assert system.calls == []


def test_half_a_batch_is_answered_as_the_whole_batch_was_and_written_once(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = run(Echo(), output=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    system = Echo()
    assert run(system, output=path) == whole
    (rows, options), *others = system.calls
    assert (rows, options["seed"], others) == (ROWS[4:8], 4, [])
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_a_sampled_evaluation_of_a_real_system_resumes_to_the_same_texts(tmp_path):
    agents = {"expert": tiny_agent("llama", "expert"), "learner": tiny_agent("qwen3", "learner", seed=1)}
    system = RecursiveMAS.create(agents, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    rows = [{"question": question, "answer": "fox"} for question in ("fox", "the lazy dog", "0 + 1 =", "plan", "?")]
    path = tmp_path / "records.jsonl"
    options = {"batch_size": 2, "metric": "exact", "temperature": 1.0, "max_new_tokens": 6, "seed": 5, "output": path}
    records, summary = run(system, rows, **options)
    answers = [
        a for n in (0, 2, 4) for a in system.answer(rows[n : n + 2], temperature=1.0, max_new_tokens=6, seed=5 + n)
    ]
    assert [record.text for record in records] == [answer.text for answer in answers]
    assert len({record.text for record in records}) > 1
    assert summary.latent_steps == 9  # the expert twice, the learner once
    assert summary.text_tokens == sum(len(answer.tokens) for answer in answers) / 5
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert [record.text for record in run(system, rows, **options).records] == [record.text for record in records]


def test_records_of_another_run_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    run(Echo(), output=path)
    for changed in ({"rounds": 2}, {"mode": "text"}, {"metric": "exact"}, {"seed": 1}, {"rows": ROWS[1:]}):
        with pytest.raises(ValueError, match=r"records.jsonl, line 1: of another system, other settings or other rows"):
            run(Echo(), output=path, **changed)
    system = Echo()
    with torch.no_grad():
        system.outer_links["expert", "learner"].bias[0] += 1
    with pytest.raises(ValueError, match="line 1: of another system"):
        run(system, output=path)
    path.write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match="line 1: not a record"):
        run(Echo(), output=path)


def test_bad_input_is_refused_before_anything_is_answered():
    system = Echo()
    with pytest.raises(ValueError, match="metric must be one of exact, last_word, choice, math, got 'vibes'"):
        run(system, metric="vibes")
    with pytest.raises(ValueError, match="row 1: no field 'answer' with the answer"):
        run(system, [ROWS[0], {"says": "?"}])
    with pytest.raises(ValueError, match="row 0: no field 'gold'"):
        run(system, answer_field="gold")
    with pytest.raises(ValueError, match="at least one question"):
        run(system, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(system, batch_size=0)
    assert system.calls == []


def test_wilson_interval():
    assert wilson(0, 0) == (0, 1)
    # Bounds solve |share - p| = z sqrt(p (1 - p) / n): the definition of the interval.
    for correct, questions in ((0, 10), (7, 10), (505, 512), (10, 10)):
        low, high = wilson(correct, questions)
        assert 0 <= low <= correct / questions <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                deviation = 1.959963984540054 * (bound * (1 - bound) / questions) ** 0.5
                assert abs(correct / questions - bound) == pytest.approx(deviation)
    assert summarize([]).high == 1


@pytest.mark.parametrize(
    ("metric", "text", "expected", "correct"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "42 dogs", "42", False),
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


def test_math_metric_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    system = Echo()
    with pytest.raises(ImportError, match=r"pip install 'recmas-kernels\[eval\]'"):
        run(system, metric="math")
    assert system.calls == []
