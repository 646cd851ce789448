"""The notes task: its questions, its halves, its prompts, and general texts for links."""

from __future__ import annotations

import json

import pytest

from recmas.cli import main
from recmas.lab import notes
from recmas.lab.copies import common_words, copies
from recmas.prompts.template import Template
from tests.runtime.tiny import tiny_agent


def told(row):
    return f"{row['lead']}{row['targets']['reader']}"


@pytest.mark.parametrize("hops", [1, 2])
def test_rows_depend_on_their_number_alone(hops):
    rows = notes.questions("test", 1, 20, hops=hops)
    assert rows[:7] == notes.questions("test", 1, 7, hops=hops)
    assert rows != notes.questions("test", 2, 20, hops=hops)
    assert rows != notes.questions("train", 1, 20, hops=hops)
    assert len({row["question"] for row in rows}) > 10
    assert [row["half"] for row in rows[:4]] == ["known", "unknown", "known", "unknown"]


def test_one_hop_is_answered_by_the_message_alone():
    for row in notes.questions("test", 3, 60):
        assert row["solver_notes"] == ""
        assert row["answer"] in told(row).split(",")[0]
        assert told(row).split()[0] in row["question"]
        facts = set(told(row).removesuffix(".").replace(" and ", ", ").split(" ", 1)[1].split(", "))
        person = next(part for part in row["reader_notes"].split(". ") if part.startswith(told(row).split()[0]))
        assert facts == set(person.removesuffix(".").replace(" and ", ", ").split(" ", 1)[1].split(", "))


def test_two_hops_need_the_message_and_the_solvers_own_notes():
    for row in notes.questions("test", 3, 60, hops=2):
        city = told(row).split(" lives in ")[1].split(",")[0]
        assert f"The flag of {city} is {row['answer']}." in row["solver_notes"]
        assert row["answer"] not in row["reader_notes"]
        assert city not in row["question"]


def test_the_unknown_half_occurs_in_no_training_text():
    words = {word for row in notes.texts(0, 300) for word in f"{row['prompt']}{row['text']}".replace(",", "").split()}
    words = {word.rstrip(".") for word in words}
    unknown = set(notes.held_back())
    assert not words & unknown
    assert words >= {*notes.half(notes.NAMES, "known"), *notes.half(notes.VALUES["job"], "known")}
    for row in notes.questions("test", 0, 50, ["unknown"]):
        assert row["answer"] in unknown
    prompts = " ".join(f"{one.later} " for one in notes.PROMPTS.values())
    assert not {word.strip(".,") for word in prompts.split()} & {*unknown, *notes.NAMES}
    for words in (notes.NAMES, *notes.VALUES.values(), notes.COLOURS):
        assert len(set(words)) == len(words)


def test_templates_name_the_rows_fields():
    row = notes.questions("test", 0, 1)[0]
    for role, prompt in notes.PROMPTS.items():
        template = Template(prompt.at(1))
        assert set(template.fields) <= set(row)
        assert [slot.senders for slot in template.slots] == ([] if role == "reader" else [("reader",)])
    assert "{{reader_notes}}" not in notes.PROMPTS["solver"].at(1)


def test_refused():
    with pytest.raises(ValueError, match="half must be one of known, unknown, got 'third'"):
        notes.questions("test", 0, 1, ["third"])
    with pytest.raises(ValueError, match="hops must be 1 or 2, got 3"):
        notes.questions("test", 0, 1, hops=3)


def test_word_lists_say_the_same_words_twice():
    words = [f"word{number}" for number in range(50)]
    rows = copies(words, 0, 5, length=8)
    assert rows == copies(words, 0, 9, length=8)[:5] != copies(words, 1, 5, length=8)
    for row in rows:
        assert row["prompt"] == f"List:{row['text']}\nAgain:"
        assert len(set(row["text"].split())) == 8


def test_common_words_are_tokens_of_all_and_none_of_those_left_out():
    agents = [tiny_agent("llama"), tiny_agent("qwen2")]
    words = common_words(agents, ["Plan"])
    vocabulary = agents[0].tokenizer.get_vocab()
    assert words == sorted(words)
    assert len(words) > 3
    assert all(f"Ġ{word}" in vocabulary for word in words)
    assert "plan" in common_words(agents)
    assert "plan" not in words


def test_the_notes_system_runs():
    agents = {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(notes.ROLES)}
    for agent in agents.values():
        agent._config.max_position_embeddings = 4096  # prompts of examples are long for so small a vocabulary
    system = notes.notes_system(agents, latent_steps=2)
    assert not any(setting.chat for setting in system.settings.values())
    rows = notes.questions("test", 0, 2)
    (answer, _) = system.answer(rows, trace=True)
    assert answer.latent_steps == {"reader": 2}
    assert answer.text_tokens["solver"] <= notes.ANSWER_TOKENS
    (answer, _) = system.answer(rows, mode="text")
    assert answer.text_tokens["reader"] <= notes.MESSAGE_TOKENS


def test_command(tmp_path, capsys):
    words = ["lab", "notes", str(tmp_path / "notes.jsonl"), "--seed", "4", "--count", "6", "--hops", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"6 questions in {tmp_path / 'notes.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert rows == notes.questions("test", 4, 6, hops=2)
    assert main([*words, "--halves", "known,third"]) == 2
    assert capsys.readouterr().err == "recmas: error: half must be one of known, unknown, got 'third'\n"
    assert main(["lab", "notes", str(tmp_path)]) == 2
    assert "is a folder, expected the name of a JSONL file" in capsys.readouterr().err
