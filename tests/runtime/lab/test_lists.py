"""Lists: the task of long messages, its lessons and its wide vocabulary, and a system of it from nothing."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from recmas import RecursiveMAS
from recmas.cli import main
from recmas.lab.agents import fresh_model, widen
from recmas.lab.grid import CONTROLS, MODES, grid
from recmas.lab.lessons import UNSCORED, School
from recmas.lab.lists import LENGTH, NUMBERS, questions, turns
from recmas.lab.tasks import LIST, RELAY, task_of
from recmas.lab.vocabulary import tokenizer_for
from recmas.lab.world import FACTS, ROLES, draw_world
from recmas.prompts.jsonl import read_rows
from tests.runtime.lab.few_steps import list_lab

SHIPPED = str(Path(__file__).parents[3] / "examples" / "relay")


def facts(row: dict[str, object], role: str) -> dict[str, str]:
    return dict(fact.split(":") for fact in str(row[f"{role}_sheet"]).split())


@pytest.mark.parametrize("row", questions("train", 5, (1,), 20), ids=lambda row: row["answer"])
def test_everything_is_said_and_one_item_is_asked_for(row: dict[str, object]) -> None:
    """By a walk of its own, over the sheets' text."""
    items = str(row["question"]).split()
    targets = row["targets"]
    assert isinstance(targets, dict)
    assert tuple(items[1::2]) == NUMBERS
    for role in ROLES[:-1]:
        items[::2] = [facts(row, role)[value] for value in items[::2]]
        assert targets[role] == " ".join(items)
        tokens = tokenizer_for(role, LIST.marks)(targets[role], add_special_tokens=False)["input_ids"]
        assert len(tokens) == LIST.latent_steps[role] == 2 * LENGTH
    asked = items[items.index(str(row["number"])) - 1]
    assert targets["solver"] == row["answer"] == facts(row, "solver")[asked]


@pytest.mark.parametrize("role", ROLES)
def test_a_turn_finds_what_the_sheet_says(role: str) -> None:
    world = draw_world(random.Random(1))
    for turn in itertools.islice(turns(role, world, random.Random(2)), 8):
        items = turn.message.split()
        found = [world.facts(role)[value] for value in items[::2]]
        assert tuple(items[1::2]) == NUMBERS
        assert list(turn.found[::2]) == list(turn.found[1::2]) == found
        if role == "solver":
            assert turn.reply == found[int(turn.fields["number"]) - 1]
        else:
            assert turn.reply.split()[::2] == found


def test_who_is_asked_for_a_number_alone_knows_it() -> None:
    fields = {role: " ".join(templates.values()) for role, templates in LIST.prompts.items()}
    assert [role for role in ROLES if "{{number}}" in fields[role]] == ["solver"]
    assert questions("test", 3, (1,), 5, first=2) == questions("test", 3, (1,), 7)[2:]
    assert questions("test", 3, (1,), 2) != questions("validation", 3, (1,), 2)
    with pytest.raises(ValueError, match="hops must be 1 in questions of lists, got 2"):
        questions("test", 3, (1, 2), 2)


@pytest.mark.parametrize("role", ROLES)
def test_a_lesson_labels_what_a_perfect_agent_finds_and_says(role: str) -> None:
    school = School(LIST, role, "train", 0)
    tokens, count = school.tokenizer, 3
    for lesson in (school.lesson(2, count, noise=0.5, reply_noise=0.5) for _ in range(4)):  # in both rhythms
        for groups, labels, values in zip(lesson.groups, lesson.labels, lesson.values, strict=True):
            sheet = dict(fact.split(":") for fact in tokens.decode(groups[1 : FACTS + 1, 0]).split())
            said = [int(label) for label in labels if label != UNSCORED]
            first = {tokens(value, add_special_tokens=False)["input_ids"][0] for value in sheet.values()}
            spoken = tokens.decode(labels[values]).split()
            if role == "solver":  # one message of ten items, each found twice, and a question a turn
                assert set(said[: 2 * LENGTH]) <= first
                assert len(said) == 2 * LENGTH + 3 * count
                assert said[2 * LENGTH + 2 :: 3] == [tokens.eos_token_id] * count
                assert len(spoken) == count
            else:
                assert len(said) == count * (2 * LENGTH + 2 * LENGTH + 1)
                assert set(said[: 2 * LENGTH]) <= first
                assert said[: 2 * LENGTH : 2] == said[2 * LENGTH : 4 * LENGTH : 2]  # what it finds, it says in order
                assert tokens.decode(said[2 * LENGTH + 1 : 4 * LENGTH : 2]).split() == list(NUMBERS)
                assert len(spoken) == count * LENGTH
            assert set(spoken) <= set(sheet.values())
        assert float(lesson.noise[:, : FACTS + 1].max()) == 0.0
        assert 0.0 < float(lesson.noise[:, -1].min()) <= float(lesson.noise.max()) <= 0.5  # replies have noise, too


def test_each_solver_turn_sees_the_message_and_no_other_question() -> None:
    lesson = School(LIST, "solver", "train", 0).lesson(1, 2, noise=0.0)
    visible, length = lesson.visible[0, 0], lesson.groups.shape[1]
    turn = 4  # <out>, the number and the two pieces of a word
    start = length - turn
    assert bool(visible[-1, : start - turn].all())  # sheet and message
    assert not bool(visible[-1, start - turn : start].any())
    assert lesson.positions[0, start] == lesson.positions[0, start - turn]


@pytest.mark.parametrize("role", ["planner", "critic"])
def test_a_wide_vocabulary_is_never_chosen(role: str) -> None:
    """Of tied and untied tables."""
    tokenizer = tokenizer_for(role, LIST.marks)
    model = fresh_model(role, tokenizer, seed=0)
    ids = torch.randint(len(tokenizer), (4, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        widen(model, 3000, seed=2)
        after = model(ids).logits
    assert model.config.vocab_size == after.shape[-1] == 3000
    assert torch.equal(after.argmax(dim=-1), before.argmax(dim=-1))
    assert torch.allclose(after[..., : len(tokenizer)], before, atol=1e-6)
    assert len(model.get_input_embeddings().weight.unique(dim=0)) > 2000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab after a few steps of every stage."""
    return list_lab(tmp_path_factory.mktemp("labs") / "list")


def test_a_lab_of_lists_is_built_and_measured(built: Path) -> None:
    record = json.loads((built / "lab.json").read_text())
    assert record["task"] == "list"
    assert set(record["links"]["validation"]) == {"warmup", "one round"}
    assert {row["hops"] for row in read_rows(built / "questions.jsonl")} == {1}
    system = RecursiveMAS.from_pretrained(built)
    assert task_of(system) is LIST
    assert {agent.model.config.vocab_size for agent in system.agents.values()} == {600}
    cells = {cell.method: cell for cell in grid(system, 1, 4)}
    assert set(cells) == {*MODES, *CONTROLS}
    assert {cell.hops for cell in cells.values()} == {1}
    assert cells["latent"].latent_steps == 2 * 2 * LENGTH
    assert cells["latent"].chance == 1 / FACTS


def test_questions_of_lists_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.jsonl"
    assert main(["lab", "questions", str(path), "--task", "list", "--seed", "5", "--count", "3"]) == 0
    assert read_rows(path) == questions("test", 5, (1,), 3)
    assert capsys.readouterr().out == f"3 questions in {path}\n"


def test_the_relay_is_told_from_lists() -> None:
    assert task_of(RecursiveMAS.from_pretrained(SHIPPED)) is RELAY
