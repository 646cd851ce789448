"""Batches that memory decides: their sizes from a free memory that is made up, and what a lack of memory does."""

from __future__ import annotations

import bisect
import json

import pytest
import torch

from recmas import SEQUENTIAL, Agent, AnswerOptions, RecursiveMAS
from recmas.answering import batching
from recmas.answering.plan import Plan
from recmas.config.system_json import PromptSpec
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.evaluation.sweeps import sweep
from recmas.sizing.model_bytes import model_bytes
from tests.runtime.commands import main
from tests.runtime.tiny import tiny_agent

QUESTIONS = ["fox", "the lazy dog " * 8, "0 + 1 =", "what is the answer to everything? " * 3, "plan", "?"]
OPTIONS = {"max_new_tokens": 5, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def mas():
    agents = {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("llama", "critic", 40, 2),
        "solver": tiny_agent("qwen2", "solver", 24, 3),
    }
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=3, seed=0)


@pytest.fixture
def sizes(monkeypatch):
    """Rows of every prompt batch that an agent thinks over or answers."""
    seen, think, write = [], Agent.think, Agent.write

    def thinking(self, prompt, *rest, **named):
        seen.append(prompt.embeds.shape[0])
        return think(self, prompt, *rest, **named)

    def writing(self, prompt, *rest, **named):
        seen.append(prompt.embeds.shape[0])
        return write(self, prompt, *rest, **named)

    monkeypatch.setattr(Agent, "think", thinking)
    monkeypatch.setattr(Agent, "write", writing)
    return seen


def memory(monkeypatch, free):
    monkeypatch.setattr(batching, "free_bytes", lambda device: free)


def texts(answers):
    return [answer.text for answer in answers]


def planned(mas, rows=QUESTIONS, constants=None, **options):
    plan = Plan(mas, AnswerOptions(batch_size="auto", **options))
    return list(batching.batches(plan, [{"question": row} for row in rows], constants))


def test_memory_decides_and_long_rows_come_in_smaller_batches(mas, monkeypatch):
    memory(monkeypatch, 2**40)
    rows = ["fox"] * 300
    assert [len(batch) for batch in planned(mas, rows)] == [256, 44]
    memory(monkeypatch, 0)
    assert [len(batch) for batch in planned(mas)] == [1] * 6
    rows = ["fox"] * 20 + ["the lazy dog " * 10] * 20
    for free in (2_000_000, 4_000_000, 8_000_000):
        memory(monkeypatch, free)
        batches = planned(mas, rows)
        assert sorted(number for batch in batches for number in batch) == list(range(40))
        short = max(len(batch) for batch in batches if max(batch) < 20)
        long = max(len(batch) for batch in batches if min(batch) >= 20)
        assert 1 <= long < short


def test_more_work_makes_smaller_batches(mas, monkeypatch):
    memory(monkeypatch, 2_000_000)
    rows = ["fox"] * 200
    first = len(planned(mas, rows, rounds=1, latent_steps=1, max_new_tokens=1)[0])
    assert first > 1
    for more in ({"latent_steps": 60}, {"max_new_tokens": 100}, {"rounds": 2}):
        options = {"rounds": 1, "latent_steps": 1, "max_new_tokens": 1, **more}
        assert 1 <= len(planned(mas, rows, **options)[0]) < first


def test_prefixes_that_outlive_a_batch_leave_less_room_until_they_are_read(mas, monkeypatch, sizes):
    said = "question: what is the answer to everything? notes and plan and critique and solution " * 4
    prompts = {"planner": PromptSpec(said + "{{question}}", said + "{{question}} {{from:solver}}")}
    longer = RecursiveMAS.create(mas.agents, SEQUENTIAL, rounds=2, latent_steps=3, prompts=prompts, seed=0)
    constant = longer._prompts["planner"].constant_ids(1)  # and of the second round
    size = model_bytes(mas.agents["planner"].model.config, 4).snapshot(len(constant))

    def first(free, reuse):
        memory(monkeypatch, free)
        return len(planned(longer, ["fox"] * 5, ConstantPrefixes() if reuse else None)[0])

    enough = bisect.bisect_left(range(10_000_000), 4, key=lambda free: first(free, False))
    assert (first(enough, False), first(enough, True)) == (4, 3)
    assert (first(enough + size - 2, True), first(enough + size, True)) == (3, 4)

    read, of = [], ConstantPrefixes.of

    def reading(self, *arguments):
        snapshot, positions = of(self, *arguments)
        if positions:  # from here on it takes its share of what was free
            memory(monkeypatch, enough)
            read.append(positions)
        return snapshot, positions

    monkeypatch.setattr(ConstantPrefixes, "of", reading)
    memory(monkeypatch, enough + size)
    sizes.clear()
    longer.answer(["fox"] * 12, batch_size="auto", max_new_tokens=5)
    assert len(read) == 1
    assert [*dict.fromkeys(sizes)] == [4]


def test_a_device_that_tells_nothing_gets_the_usual_batch(mas, monkeypatch):
    memory(monkeypatch, None)
    assert [len(batch) for batch in planned(mas, ["fox"] * 50)] == [32, 18]


def test_the_estimate_covers_what_a_batch_really_takes(mas):
    """Bytes of tensors alive at once while a batch is answered, counted by torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    from recmas.answering.prompt_lengths import lengths_of
    from recmas.sizing.row_bytes import row_bytes

    row = "the lazy dog " * 12
    plan = Plan(mas, AnswerOptions(max_new_tokens=8))
    lengths = lengths_of(plan, {"question": row})
    shapes = {role: model_bytes(agent.model.config, 4) for role, agent in mas.agents.items()}
    mas.answer([row], max_new_tokens=8)  # what is made once is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        mas.answer([row] * 16, max_new_tokens=8)
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    estimate = 16 * row_bytes(shapes, mas.devices, lengths, 2)[torch.device("cpu")]
    assert most <= estimate <= 8 * most


def test_answers_are_those_of_any_other_batch_size(mas, monkeypatch):
    whole = texts(mas.answer(QUESTIONS, **OPTIONS))
    for free in (0, 300_000, 2**40):
        memory(monkeypatch, free)
        assert texts(mas.answer(QUESTIONS, batch_size="auto", **OPTIONS)) == whole


def out_of_memory(monkeypatch, most, at=None):
    """No agent (or the one called `at` alone) can think over more than `most` rows."""
    think = Agent.think

    def thinking(self, prompt, *rest, **named):
        if prompt.embeds.shape[0] > most and at in (None, self.name):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return think(self, prompt, *rest, **named)

    monkeypatch.setattr(Agent, "think", thinking)


@pytest.mark.parametrize("at", [None, "critic"])
def test_a_lack_of_memory_halves_the_batch_and_changes_nothing_else(mas, monkeypatch, sizes, at):
    expected = mas.answer(QUESTIONS, trace=True, **OPTIONS)
    memory(monkeypatch, 2**40)
    out_of_memory(monkeypatch, 2, at)
    sizes.clear()
    seen = []
    with pytest.warns(UserWarning, match="^out of memory with 6 rows at once; going on with fewer$") as warned:
        answers = mas.answer(QUESTIONS, batch_size="auto", trace=True, progress=seen.append, **OPTIONS)
    assert len(warned) == 1
    assert texts(answers) == texts(expected)
    for answer, other in zip(answers, expected, strict=True):
        assert (answer.latent_steps, answer.text_tokens) == (other.latent_steps, other.text_tokens)
        assert len(answer.handoffs) == len(other.handoffs)
    assert sum(seen) == len(QUESTIONS) * 6
    assert list(answers.seconds) == list(expected.seconds)
    assert max(sizes[-6:]) == 1  # 6 to 3 to 1, and it stays at 1


def test_a_lack_of_memory_is_told_where_nothing_can_be_halved(mas, monkeypatch):
    memory(monkeypatch, 2**40)
    out_of_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        mas.answer(QUESTIONS, batch_size="auto", **OPTIONS)
    with pytest.raises(torch.OutOfMemoryError):
        mas.answer(QUESTIONS, batch_size=4, **OPTIONS)


def test_text_that_was_shown_is_not_shown_again(mas, monkeypatch):
    memory(monkeypatch, 2**40)
    write, shown = Agent.write, []

    def breaking(self, *rest, **named):
        for number, grown in enumerate(write(self, *rest, **named)):
            if number == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield grown

    monkeypatch.setattr(Agent, "write", breaking)
    with pytest.raises(torch.OutOfMemoryError):
        mas.answer(QUESTIONS, batch_size="auto", on_text=lambda row, piece: shown.append(row), **OPTIONS)
    assert shown


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_gpu_decides(mas):
    mas.to("cuda")
    try:
        answers = mas.answer(QUESTIONS * 50, batch_size="auto", max_new_tokens=4)
        assert len(answers) == 300
        assert torch.cuda.max_memory_allocated() < 0.8 * torch.cuda.get_device_properties(0).total_memory
    finally:
        mas.to("cpu")


def test_a_sweep_groups_its_records_whatever_memory_holds(mas, monkeypatch, tmp_path, sizes):
    rows = [{"question": question, "answer": "fox"} for question in QUESTIONS]
    memory(monkeypatch, 0)
    one = sweep(mas, rows, batch_size="auto", output=tmp_path / "r.jsonl", progress=False, **OPTIONS)
    assert set(sizes) == {1}
    memory(monkeypatch, 2**40)
    sizes.clear()
    again = sweep(mas, rows, batch_size="auto", output=tmp_path / "r.jsonl", progress=False, **OPTIONS)
    assert sizes == []  # the records are the same run's
    assert [record.text for record in again.records] == [record.text for record in one.records]
    fresh = sweep(mas, rows, batch_size="auto", progress=False, **OPTIONS)
    assert [record.text for record in fresh.records] == [record.text for record in one.records]
    assert set(sizes) == {6}


def test_auto_on_the_command_line(mas, tmp_path, monkeypatch, capsys):
    mas.save_pretrained(tmp_path / "s")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": row, "answer": "x"}) + "\n" for row in QUESTIONS)
    )
    monkeypatch.chdir(tmp_path)
    words = ["--batch-size", "auto", "--max-new-tokens", "2", "--json"]
    assert main(["run", "s", "--questions", "rows.jsonl", *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 6
    assert main(["eval", "s", "--data", "rows.jsonl", *words]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["questions"] == 6
    for wrong in ("0", "all"):
        with pytest.raises(SystemExit):
            main(["run", "s", "--question", "x", "--batch-size", wrong])
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"--batch-size: invalid N or auto value: '{wrong}'" in err
    with pytest.raises(ValueError, match="^batch_size: 'most' is neither a number nor 'auto'$"):
        mas.answer(["x"], batch_size="most")
