"""The relay's worlds and tokenizers: what a question is, who may see what, and how each agent spells it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recmas.lab.agents import fresh_model
from recmas.lab.lessons import UNSCORED, School, turn_layout
from recmas.lab.tasks import RELAY
from recmas.lab.vocabulary import spelled, tokenizer_for
from recmas.lab.world import (
    ANIMALS,
    COLOURS,
    FACTS,
    MAX_HOPS,
    ROLES,
    SPLITS,
    WORDS,
    World,
    chance,
    draw_world,
    questions,
)
from recmas.prompts.template import Template


def facts(row: dict[str, object], role: str) -> dict[str, str]:
    return dict(fact.split(":") for fact in str(row[f"{role}_sheet"]).split())


@pytest.mark.parametrize("seed", range(20))
def test_a_world_is_three_bijections(seed: int) -> None:
    world = draw_world(random.Random(seed))
    for mapping, keys, values in (
        (world.colour_of, WORDS, COLOURS),
        (world.animal_of, COLOURS, ANIMALS),
        (world.word_of, ANIMALS, WORDS),
    ):
        assert len(mapping) == len(set(mapping.values())) == FACTS
        assert set(mapping) <= set(keys)
        assert set(mapping.values()) <= set(values)
    assert set(world.colour_of.values()) == set(world.animal_of)
    assert set(world.animal_of.values()) == set(world.word_of)
    assert set(world.word_of.values()) == set(world.colour_of)


@pytest.mark.parametrize("row", questions("train", 5, range(MAX_HOPS + 1), 40), ids=lambda row: row["question"])
def test_targets_and_answer_follow_from_the_sheets(row: dict[str, object]) -> None:
    """By a walk of its own, over the sheets' text."""
    sheets = {role: facts(row, role) for role in ROLES}
    hops, value = str(row["question"]).split()
    left, position = int(hops), 0
    targets = row["targets"]
    assert isinstance(targets, dict)
    for round, role in itertools.product(range(MAX_HOPS), ROLES):
        if position % 3 == 0 and left > 0:
            left, position = left - 1, position + 1
            value = sheets["planner"][value]
        elif position % 3 != 0:
            position += 1
            value = sheets[role][value]
        assert targets[role][round] == f"{left} {value}"
    assert value == row["answer"]
    assert position == 3 * int(hops) == 3 * int(str(row["hops"]))


def test_each_sheet_is_read_by_one_agent_only() -> None:
    for role, templates in RELAY.prompts.items():
        for text in templates.values():
            fields = set(Template(text).fields)
            assert fields & {f"{other}_sheet" for other in ROLES} == {f"{role}_sheet"}
    row = questions("test", 1, [1], 1)[0]
    assert str(row["answer"]) not in str(row["question"])


def test_rows_are_reproducible_and_splits_share_none() -> None:
    drawn = {split: questions(split, 3, (1, 2, 3), 200) for split in SPLITS}
    assert drawn["test"] == questions("test", 3, (1, 2, 3), 200)
    assert drawn["test"][150:160] == questions("test", 3, (1, 2, 3), 10, first=150)
    sheets = [str(row["planner_sheet"]) for rows in drawn.values() for row in rows]
    assert len(set(sheets)) == len(sheets)
    assert drawn["test"][0] != questions("test", 4, (1, 2, 3), 1)[0]
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        questions("dev", 3, (1,), 1)


def test_chance_is_what_a_count_of_worlds_says() -> None:
    """A system m rounds short answers the word it has reached: right where m more hops lead back to it."""
    rng = random.Random(0)
    worlds = [draw_world(rng) for _ in range(4000)]
    for missing in (1, 2, 3):
        back = sum(_after(world, missing) for world in worlds) / len(worlds)
        sigma = (chance(missing, 0) * (1 - chance(missing, 0)) / len(worlds)) ** 0.5
        assert abs(back - chance(missing, 0)) < 5 * sigma
    assert chance(1, 1) == chance(2, 3) == chance(2, 1) == 1 / 8
    assert chance(3, 1) == 1 / 4


def _after(world: World, hops: int) -> bool:
    start = word = next(iter(world.colour_of))
    for _ in range(hops):
        word = world.hop(word)
    return word == start


@pytest.mark.parametrize("role", ROLES)
def test_tokenizers_round_trip_through_a_model_folder(role: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(role, RELAY.marks)
    fresh_model(role, tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    for row in questions("test", 0, (0, 1, 2, 3, 4), 20):
        sheet, messages = str(row[f"{role}_sheet"]), row["targets"]
        assert isinstance(messages, dict)
        for text in (sheet, *messages[role]):
            ids = stored(text, add_special_tokens=False)["input_ids"]
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert stored.unk_token_id not in ids
            assert stored.decode([*ids, stored.eos_token_id], skip_special_tokens=True) == text
        assert len(stored(sheet, add_special_tokens=False)["input_ids"]) == FACTS


def test_the_solver_spells_names_in_two_pieces() -> None:
    tokenizer = tokenizer_for("solver", RELAY.marks)
    for name in (*WORDS, *ANIMALS):
        assert tuple(tokenizer(name, add_special_tokens=False).tokens()) == spelled(name)
    first_pieces = [spelled(name)[0] for name in (*WORDS, *ANIMALS)]
    assert len(set(first_pieces)) == len(first_pieces)
    assert tokenizer("<bos> zebra:bako", add_special_tokens=False).tokens() == ["<bos>", "zebra:bako"]


def test_turns_of_a_lesson_do_not_see_each_other() -> None:
    visible, positions = turn_layout(sheet_tokens=2, turns=2, turn_tokens=2)
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3]]


@pytest.mark.parametrize("role", ROLES)
def test_a_lesson_says_what_a_perfect_agent_would(role: str) -> None:
    school = School(RELAY, role, "train", 0)
    lesson = school.lesson(sheets=4, turns=3, noise=0.0)
    tokens, length = school.tokenizer, lesson.groups.shape[1]
    for groups, labels, values in zip(lesson.groups, lesson.labels, lesson.values, strict=True):
        said = [int(label) for label in labels if label != UNSCORED]
        replies = len(said) // 3
        sheet = set(tokens.decode(groups[1 : FACTS + 1, 0]).split())
        for turn in range(3):
            hint, *reply, end = said[turn * replies : (turn + 1) * replies]
            assert end == tokens.eos_token_id
            assert hint == reply[1]
            assert tokens.decode(reply).split()[0] in "01234"
        assert len(sheet) == FACTS
        assert int(values.sum()) == 3 * (replies - 3)
    assert lesson.visible.shape == (1, 1, length, length)
