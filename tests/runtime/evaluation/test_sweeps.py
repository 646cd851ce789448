"""The sweep and its record file, on real tiny systems and on one that writes what the row says."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
import torch

from recmas import Agent, AnswerOptions, RecursiveMAS
from recmas.agents.chat_template import ChatTemplate
from recmas.agents.sampling import Sampler
from recmas.answering.answers import Answer, Answers, RowError, RowsFailedError
from recmas.cli import main
from recmas.config.pattern import DISTILLATION
from recmas.config.system_json import Defaults
from recmas.evaluation import Cell, wilson
from recmas.evaluation.baselines import looped_model, single_agent
from recmas.evaluation.sweeps import batch_seed, sweep
from recmas.system.fingerprint import digest
from recmas.tools import Toolbox
from tests.runtime.tiny import tiny_agent, tiny_tokenizer


class Echo(RecursiveMAS):
    """Answers a row with its "says"; keeps what it was asked, and can break down at one of the rows."""

    def answer(self, rows, options):
        self.calls.append((rows, options))
        if any(row["says"] == self.breaks_at for row in rows):
            raise KeyboardInterrupt
        answers = Answers(Answer(row["says"], [1], {"expert": 3, "learner": 2}, {"learner": 4}) for row in rows)
        answers.seconds["round 1, expert"] = 0.5 * len(rows)
        answers.seconds["round 1, learner"] = 1.5 * len(rows)
        return answers


AGENTS = {"expert": tiny_agent("llama", "expert"), "learner": tiny_agent("qwen3", "learner", seed=1)}
ROWS = [{"question": "?", "says": f"{n} bako", "answer": "bako" if n % 3 else "dilo"} for n in range(10)]
QUESTIONS = [{"question": question, "answer": "fox"} for question in ("fox", "the lazy dog", "0 + 1 =", "plan", "?")]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 6}


def echo():
    system = Echo.create(AGENTS, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    system.calls, system.breaks_at = [], None
    return system


@pytest.fixture(scope="module")
def real():
    return RecursiveMAS.create(AGENTS, DISTILLATION, rounds=2, latent_steps=3, seed=0)


def run(system, rows=ROWS, **options):
    return sweep(system, rows, **{"metric": "last_word", "batch_size": 4, "progress": False, **options})


def timeless(done):
    """Records without what the machine decides."""
    return [(record.key, record.text, record.correct, record.latent_steps) for record in done.records]


def test_records_and_summary():
    records, (summary,) = run(echo())
    assert [record.index for record in records] == list(range(10))
    assert [record.correct for record in records] == [n % 3 != 0 for n in range(10)]
    assert (records[3].text, records[3].expected) == ("3 bako", "dilo")
    assert (records[3].text_tokens, records[3].latent_steps) == (4, 5)
    assert records[9].seconds == {"round 1, expert": 0.5, "round 1, learner": 1.5}
    assert {record.cell for record in records} == {Cell("latent", 2, 3)}
    assert (summary.questions, summary.correct, summary.accuracy.value) == (10, 6, 0.6)
    assert (summary.accuracy.low, summary.accuracy.high) == wilson(6, 10)
    # This process' peak when the last batch had run: more than its size then, at most its peak now.
    assert 2**20 < summary.peak_memory <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_options_reach_the_system_and_each_batch_has_its_seed():
    system = echo()
    run(system, modes=["text"], rounds=[3], max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3, samples=2)
    assert [len(rows) for rows, _ in system.calls] == [4, 4, 2] * 2
    seeds = [options.seed for _, options in system.calls]
    assert seeds == [batch_seed(3, sample, first) for sample in (0, 1) for first in (0, 4, 8)]
    assert len(set(seeds)) == 6
    decoding = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    expected = AnswerOptions(mode="text", rounds=3, latent_steps=0, batch_size=4, **decoding)
    for seed, (_, options) in zip(seeds, system.calls, strict=True):
        assert options.toolbox.tools == {}
        assert options == replace(expected, seed=seed, tools=options.tools)


class Counter:
    name = "count"

    def run(self, text):
        return str(len(text))


class Calling(Echo):
    """Every answer of it takes as many calls as tools allow."""

    def answer(self, rows, options):
        toolbox = options.toolbox
        answers = super().answer(rows, options)
        for answer in answers:
            answer.tool_calls = [toolbox.call("count", "abc", 0)] * toolbox.max_calls if toolbox.tools else []
        return answers


def test_tools_are_off_unless_asked_for_and_are_part_of_the_run(tmp_path):
    system = Calling.create(AGENTS, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    system.calls, system.breaks_at = [], None
    path = tmp_path / "records.jsonl"
    plain = run(system)
    assert {record.tool_calls for record in plain.records} == {0}
    box = Toolbox([Counter()], max_calls=2)
    called = run(system, tools=box, output=path)
    assert {record.tool_calls for record in called.records} == {2}
    assert called.summaries[0].tool_calls == 2.0
    assert run(system, tools=[Counter()], samples=1).summaries[0].tool_calls == 5.0
    assert run(system, tools=box, output=path).records == called.records
    for others in ((), Toolbox([Counter()], max_calls=3)):
        with pytest.raises(ValueError, match="line 1: of another system, other settings or other rows"):
            run(system, tools=others, output=path)


def test_tools_run_where_the_model_calls_them(real, monkeypatch):
    """The shipped python tool, called by a model that is made to."""
    from recmas.tools import SHIPPED

    agent = real.agents["learner"]
    words = agent.literal("<python>print(6 * 7)</python>")
    monkeypatch.setattr(Sampler, "choose", scripted(words))
    records = run(real, QUESTIONS[:1], tools=[SHIPPED["python"]("none")], max_new_tokens=len(words) + 1).records
    assert records[0].tool_calls == 1
    assert "<result> 42 </result>" in records[0].text


def scripted(words):
    left = iter([*words, *[words[0]] * 100])
    return lambda self, logits, uniform: torch.tensor([next(left)] * logits.shape[0])


def test_only_rows_that_are_too_long_leave_a_sweep_going_on(tmp_path):
    """The second batch loses its row 5 with a process; rows 0 and 4 are too long."""

    class Failing(Echo):
        def answer(self, rows, options):
            answers = super().answer(rows, options)
            why = {"0 bako": RowError("long"), "4 bako": RowError("long"), "5 bako": ConnectionError("gone")}
            raise RowsFailedError(answers, {at: why[row["says"]] for at, row in enumerate(rows) if row["says"] in why})

    system = Failing.create(AGENTS, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    system.calls, system.breaks_at = [], None
    with pytest.raises(ValueError, match="^row 5: gone$") as failure:
        run(system, output=tmp_path / "records.jsonl")
    assert isinstance(failure.value.__cause__, ConnectionError)
    assert len(system.calls) == 2
    lines = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert [line["index"] for line in lines] == [1, 2, 3, 6, 7]


def test_every_cell_is_the_system_or_baseline_it_names(real):
    records, summaries = run(
        real,
        QUESTIONS,
        modes=["latent", "text", "single", "loop"],
        rounds=[1, 2],
        latent_steps=[0, 3],
        max_new_tokens=4,
        batch_size=5,
    )
    cells = [Cell(summary.mode, summary.rounds, summary.steps) for summary in summaries]
    assert cells == [
        *(Cell("latent", rounds, steps) for rounds in (1, 2) for steps in (0, 3)),
        Cell("text", 1, 0),
        Cell("text", 2, 0),
        Cell("single", 1, 0),
        Cell("loop", 1, 0),
        Cell("loop", 2, 0),
        Cell("loop", 2, 3),
    ]
    assert [record.cell for record in records] == [cell for cell in cells for _ in QUESTIONS]
    systems = {"single": single_agent(real), "loop": looped_model(real)}
    for number, (mode, rounds, steps) in enumerate(cells):
        answers = systems.get(mode, real).answer(
            QUESTIONS, mode="text" if mode == "text" else "latent", rounds=rounds, latent_steps=steps, max_new_tokens=4
        )
        made = records[5 * number : 5 * number + 5]
        assert [record.text for record in made] == [answer.text for answer in answers]
        assert [record.text_tokens for record in made] == [sum(answer.text_tokens.values()) for answer in answers]
        assert set(made[0].seconds) == set(answers.seconds)
    thought = {cell: summary.latent_steps for cell, summary in zip(cells, summaries, strict=True)}
    assert thought[Cell("latent", 2, 3)] == 9  # the expert twice, the learner once
    assert thought[Cell("loop", 2, 3)] == 3
    assert thought[Cell("loop", 1, 0)] == thought[Cell("text", 2, 0)] == thought[Cell("single", 1, 0)] == 0


def test_steps_by_role_and_the_system_s_own(real):
    mixed = RecursiveMAS(
        real.agents, real.inner_links, real.outer_links, DISTILLATION, defaults=Defaults(rounds=2, latent_steps=1)
    )
    options = {"modes": ["latent", "loop"], "latent_steps": [None, {"learner": 4}], "max_new_tokens": 1}
    summaries = run(mixed, QUESTIONS[:1], **options).summaries
    cells = [Cell(summary.mode, summary.rounds, summary.steps) for summary in summaries]
    assert cells == [
        Cell("latent", 2, 1),
        Cell("latent", 2, {"expert": 1, "learner": 4}),
        Cell("loop", 2, 1),
        Cell("loop", 2, 4),
    ]
    assert [summary.latent_steps for summary in summaries] == [3, 6, 1, 4]


def test_a_broken_off_sweep_goes_on_without_repeating_or_losing_a_question(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    system = echo()
    system.breaks_at = "5 bako"
    with pytest.raises(KeyboardInterrupt):
        run(system, output=path, rounds=[1, 2])
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as file:
        file.write(path.read_text()[:70])
    system = echo()
    resumed = run(system, output=path, rounds=[1, 2])
    assert [(options.rounds, len(rows)) for rows, options in system.calls] == [
        (1, 4),
        (1, 2),
        (2, 4),
        (2, 4),
        (2, 2),
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["rounds"], line["index"]) for line in lines] == [(rounds, n) for rounds in (1, 2) for n in range(10)]
    assert timeless(resumed) == timeless(run(echo(), rounds=[1, 2]))
    system = echo()
    assert run(system, output=path, rounds=[1, 2]) == resumed
    assert run(system, output=path, rounds=[2]).records == resumed.records[10:]
    assert system.calls == []
    run(system, output=path, rounds=[2, 3])  # a larger sweep answers what is new
    assert [options.rounds for _, options in system.calls] == [3, 3, 3]


def test_half_a_batch_is_answered_as_the_whole_batch_was_and_written_once(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = run(echo(), output=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    system = echo()
    assert timeless(run(system, output=path)) == timeless(whole)
    (rows, options), *others = system.calls
    assert (rows, options.seed, others) == (ROWS[4:8], batch_seed(0, 0, 4), [])
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == list(range(10))


def test_sampled_answers_are_resumed_to_the_same_texts_and_differ_between_samples(real, tmp_path):
    path = tmp_path / "records.jsonl"
    options = {**SAMPLING, "batch_size": 2, "metric": "exact", "seed": 5, "samples": 3, "output": path}
    done = run(real, QUESTIONS, **options)
    by_hand = [
        answer.text
        for sample in range(3)
        for first in (0, 2, 4)
        for answer in real.answer(QUESTIONS[first : first + 2], seed=batch_seed(5, sample, first), **SAMPLING)
    ]
    assert [record.text for record in done.records] == by_hand
    assert len({record.text for record in done.records if record.index == 0}) > 1
    assert done.summaries[0].samples == 3
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    assert timeless(run(real, QUESTIONS, **options)) == timeless(done)
    assert [record.text for record in run(real, QUESTIONS, **{**options, "seed": 6, "output": None}).records] != by_hand


def test_records_of_another_run_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    run(echo(), output=path)
    written = path.read_bytes()
    for changed in ({"metric": "exact"}, {"seed": 1}, {"max_new_tokens": 3}, {"batch_size": 5}, {"rows": ROWS[1:]}):
        with pytest.raises(ValueError, match=r"records.jsonl, line 1: of another system, other settings or other rows"):
            run(echo(), output=path, **changed)
    with pytest.raises(ValueError, match=r"line 10: of another system"):
        run(echo(), ROWS[:9], output=path)
    system = echo()
    with torch.no_grad():
        system.outer_links["expert", "learner"].proj1.bias[0] += 1
    with pytest.raises(ValueError, match="line 1: of another system"):
        run(system, output=path)
    trained = tiny_agent("qwen3", "learner", seed=1)
    with torch.no_grad():
        trained.model.lm_head.weight.mul_(1.01)
    system = Echo.create({**AGENTS, "learner": trained}, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    system.calls, system.breaks_at = [], None
    with pytest.raises(ValueError, match="line 1: of another system"):
        run(system, output=path)
    assert path.read_bytes() == written


def test_a_prompt_that_names_the_date_is_another_one_the_day_after(tmp_path, monkeypatch):
    day, path, real = ["1 May"], tmp_path / "records.jsonl", ChatTemplate.__call__
    monkeypatch.setattr(
        ChatTemplate, "__call__", lambda self, messages, tools=None: f"{day[0]}: {real(self, messages, tools)}"
    )
    for _ in range(2):
        run(echo(), output=path)
    written = path.read_bytes()
    day[0] = "2 May"
    with pytest.raises(ValueError, match=r"line 1: of another system, other settings or other rows"):
        run(echo(), output=path)
    assert path.read_bytes() == written


def test_a_tokenizer_that_reads_otherwise_makes_another_system():
    before = digest(echo())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["fox"])
    other = Agent(AGENTS["learner"].model, tokenizer, name="learner")
    assert digest(Echo.create({**AGENTS, "learner": other}, DISTILLATION, rounds=2, latent_steps=3, seed=0)) != before
    assert digest(echo()) == before


@pytest.mark.parametrize(
    "content",
    [b'{"index": 0}\n', b"[]\n", b"\xff\n", b"notes", b'{"mode": 1}', b"\n"],
    ids=["other fields", "a list", "not UTF-8", "no JSON", "too few fields", "an empty line"],
)
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    system = echo()
    with pytest.raises(ValueError, match=r"records.jsonl, line 1: not a record"):
        run(system, output=path)
    assert path.read_bytes() == content
    assert system.calls == []


def test_bad_input_is_refused_before_anything_is_answered(real, tmp_path):
    system = echo()
    without_feedback = Echo.create(AGENTS, DISTILLATION, rounds=1, latent_steps=1)
    without_feedback.calls = system.calls
    path = tmp_path / "records.jsonl"
    for message, options in (
        ("metric must be one of exact, last_word, begins, choice, math, got 'vibes'", {"metric": "vibes"}),
        ("mode: 'telepathy' is not one of latent, text, single, loop", {"modes": ["latent", "telepathy"]}),
        ("rounds: 0 is not a positive integer", {"rounds": [1, 0]}),
        ("latent_steps: unknown role 'poet'", {"latent_steps": [1, {"poet": 1}]}),
        ("latent_steps: -1 for 'expert'", {"latent_steps": [-1]}),
        ("expected at least one of each", {"modes": []}),
        ("at least one question", {"rows": []}),
        ("row 1: no field 'answer' with the answer", {"rows": [ROWS[0], {"says": "?"}]}),
        ("row 0: no field 'gold'", {"answer_field": "gold"}),
        ("row 0: field 'answer' is empty", {"rows": [{"question": "?", "says": "", "answer": " "}]}),
        ("row 0: field 'answer' is empty", {"rows": [{"question": "?", "says": "", "answer": None}]}),
        ("row 0: no field 'question', which agent", {"rows": [{"says": "?", "answer": "x"}]}),
        ("row 1: agent 'expert': a prompt of ", {"rows": [ROWS[0], {**ROWS[1], "question": "fox " * 300}]}),
        ("batch_size: 0 is not positive", {"batch_size": 0}),
        ("samples must be at least 1, got 0", {"samples": 0}),
        ("samples: 2 greedy answers are one and the same", {"samples": 2}),
        ("top_p: 2.0 is not in", {"top_p": 2.0}),
        ("needs outer links that the system lacks: learner->expert", {"system": without_feedback, "rounds": [1, 2]}),
        (
            "agent 'learner' has no inner link to loop through",
            {"system": without_feedback, "modes": ["latent", "loop"]},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"system": system, "output": path, **options})
    assert system.calls == []
    assert not path.exists()


@pytest.fixture(scope="module")
def folder(real, tmp_path_factory):
    made = tmp_path_factory.mktemp("eval")
    real.save_pretrained(made / "system")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (made / "empty.jsonl").write_text("\n")
    (made / "broken.jsonl").write_text('{"question": "fox", "answer": "x"}\n\n{"question": \n')
    (made / "other.jsonl").write_text('{"mode": "latent"}\n')
    return made


def test_eval_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    output = str(tmp_path / "records.jsonl")
    words = ["eval", "system", "--data", "rows.jsonl", "--mode", "latent,text,single,loop", "--rounds", "1,2"]
    words += [
        "--latent-steps",
        "0,2",
        "--max-new-tokens",
        "2",
        "--limit",
        "3",
        "--output",
        output,
        "--tools",
        "python",
        "--unsafe",
    ]
    assert main([*words, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 4 + 2 + 1 + 3
    assert {cell["questions"] for cell in cells} == {3}
    assert set(cells[0]["stages"]) == {"round 1, expert", "round 1, learner"}
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 30
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["mode", "rounds", "steps"]
    assert len(lines) == 11
    config = tmp_path / "eval.yaml"
    config.write_text("mode: [latent, loop]\nrounds: [1]\nlatent_steps: [0, 1]\nmax_new_tokens: 1\nsamples: 2\n")
    assert (
        main(["eval", "system", "--data", "rows.jsonl", "--config", str(config), "--temperature", "1", "--json"]) == 0
    )
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["mode"], cell["steps"], cell["samples"]) for cell in cells] == [
        ("latent", 0, 2),
        ("latent", 1, 2),
        ("loop", 0, 2),
    ]
    assert list(cells[0]["pass_at"]) == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "latent,telepathy"], "latent|text|single|loop,... value: 'latent,telepathy'"),
        (["--metric", "vibes"], "'vibes'"),
        (["--rounds", "two"], "--rounds"),
        (["--rounds", "0"], "rounds: 0 is not a positive integer"),
        (["--latent-steps", "0,x"], "--latent-steps"),
        (["--samples", "3"], "samples: 3 greedy answers"),
        (["--tools", "hammer"], "--tools: unknown tool 'hammer'; there is python"),
        (["--data", "empty.jsonl"], "empty.jsonl: holds no rows"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 3: not valid JSON"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--question-field", "problem"], "row 0: no field 'problem' with the question"),
        (["--output", "other.jsonl"], "other.jsonl, line 1: not a record of an evaluation"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(folder, monkeypatch, capsys, options, message):
    monkeypatch.chdir(folder)
    try:
        status = main(["eval", "system", *([] if "--data" in options else ["--data", "rows.jsonl"]), *options])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    assert message in err
