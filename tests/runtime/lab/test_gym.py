"""Questions of reasoning-gym: how they are dealt out, and the system that asks them."""

from __future__ import annotations

import json
import sys

import pytest

from recmas.cli import main
from recmas.lab import gym
from recmas.lab.notes import notes_system
from tests.runtime.tiny import tiny_agent


@pytest.mark.parametrize("task", gym.TASKS)
def test_rows_depend_on_their_number_alone(task):
    rows = gym.questions(task, "test", 1, 20)
    assert rows[:7] == gym.questions(task, "test", 1, 7)
    assert len({json.dumps(row) for row in [*rows, *gym.questions(task, "test", 2, 20)]}) == 40
    assert rows != gym.questions(task, "train", 1, 20)


def test_whose_statement_it_is_stands_in_the_notes_alone():
    for row in gym.questions("needle_haystack", "test", 3, 40):
        does = row["question"].removeprefix("Who ").removesuffix("?")
        assert f"{row['answer']} {does}." in row["reader_notes"]
        assert 4 <= row["reader_notes"].count(".") <= 6
        assert row["answer"] not in f"{row['question']}{row['lead']}"
        assert f"{row['lead']}{row['targets']['reader']}" == f"The one who {does} is {row['answer']}."


def test_relations_are_those_of_the_first_person_to_the_second():
    answers = set()
    for row in gym.questions("family_relationships", "test", 3, 150):
        first, second = row["question"].removeprefix("What relation is ").removesuffix("?").split(" to ")
        assert f"{row['lead']}{row['targets']['reader']}" == f"{first} is the {row['answer']} of {second}."
        assert {first, second} <= set(row["reader_notes"].replace(".", "").replace(",", "").split())
        if f"{first} is married to {second}." in row["reader_notes"]:
            assert row["answer"] == "husband"  # the first one of a couple is the man, in this data set
        answers.add(row["answer"])
    assert answers >= {"husband", "wife", "mother", "father", "son", "daughter", "grandmother", "grandfather"}
    assert not answers & {"niece", "nephew", "mother-in-law", "father-in-law"}


@pytest.mark.parametrize("task", gym.TASKS)
def test_prompts_show_other_questions_and_leave_the_answer_to_the_message(task):
    agent = tiny_agent("llama")
    agent.model.config.max_position_embeddings = 4096
    rows = gym.questions(task, "test", 2, 2)
    system = notes_system({"reader": agent, "solver": agent}, prompts=gym.prompts(task))
    shown = {}
    for turn in system.walk(rows, 1):
        shown[turn.visit.role] = system.template(turn.visit.role, 1)
        turn.message = [" ?"] * 2
    assert shown["reader"].fields == ("reader_notes", "question", "lead")
    assert shown["solver"].fields == ("lead", "question")
    for template in shown.values():
        assert template.text.count("Question: ") == 1 + gym.EXAMPLES
        assert not any(row["question"] in template.text for row in rows)


def test_the_command_and_what_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "gym", "rows.jsonl", "--count", "3", "--seed", "2"]) == 0
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == gym.questions("needle_haystack", "test", 2, 3)
    assert main(["lab", "gym", "other.jsonl", "--name", "sudoku"]) == 2
    assert "task must be one of needle_haystack, family_relationships, got 'sudoku'" in capsys.readouterr().err
    monkeypatch.setattr(gym, "MOST", 2)
    assert main(["lab", "gym", "other.jsonl", "--count", "3"]) == 2
    assert "count: a seed of needle_haystack has 2 questions, got 3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert main(["lab", "gym", "other.jsonl"]) == 2
    assert "pip install 'recmas-kernels[gym]'" in capsys.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()
