"""Rows whose texts make a later prompt too long: they fail by themselves, and all others are answered."""

from __future__ import annotations

import json
import re

import pytest
import torch

from recmas import SEQUENTIAL, Latents, RecursiveMAS, RowsFailedError
from recmas.evaluation import audit, sweep, tune
from tests.runtime.commands import main
from tests.runtime.tiny import tiny_agent

LONG = (1, 3, 4)
ROWS = [
    {"question": "fox " * (40 if number in LONG else 1 + number % 3), "answer": "x", "targets": {"solver": "x"}}
    for number in range(8)
]
OPTIONS = {"mode": "text", "rounds": 1, "max_new_tokens": 60}
SAID = "agent 'critic': a prompt of [0-9]+ positions exceeds its context of 256"


@pytest.fixture(scope="module")
def mas():
    agents = {role: tiny_agent("llama", role, seed=at, chat_template=None) for at, role in enumerate(SEQUENTIAL.roles)}
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=3, latent_steps=1, seed=0)


@pytest.fixture(scope="module")
def alone(mas):
    """The texts of rows that are answered, each asked without the others."""
    rest = [number for number in range(len(ROWS)) if number not in LONG]
    return {number: mas.answer([ROWS[number]], **OPTIONS)[0].text for number in rest}


@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_others_are_answered(mas, alone, size):
    told, visits = {}, []
    with pytest.raises(RowsFailedError, match=f"^row 1: {SAID} \\(3 of 8 rows have no answer\\)$") as failure:
        mas.answer(
            ROWS,
            batch_size=size,
            progress=visits.append,
            on_answers=lambda numbers, answers: told.update(zip(numbers, answers, strict=True)),
            **OPTIONS,
        )
    assert tuple(sorted(failure.value.failed)) == LONG
    lengths = {re.search("prompt of ([0-9]+)", str(why)).group(1) for why in failure.value.failed.values()}
    assert len(lengths) == 1
    assert {number: answer.text for number, answer in told.items()} == alone
    assert [answer.text for answer in failure.value.answers] == [alone.get(number, "") for number in range(len(ROWS))]
    assert sum(visits) == len(ROWS) * 3


def test_text_that_was_shown_ends_the_run_with_all_rows_that_failed(mas):
    """Messages make both rows of the first batch too long, and in the second the row that has not settled."""
    began, shown = [], set()

    def change(visit, message):
        began.extend([visit] if (visit.round, visit.role) == (1, "planner") else [])
        states = torch.ones_like(message.states)
        states[-1] *= (-1) ** visit.round  # never settles
        long = visit.role == "planner" and visit.round == (1 if len(began) == 1 else 3)
        return Latents(states.repeat(1, 256, 1) if long else states)

    with pytest.raises(RowsFailedError, match=r"\(3 of 6 rows have no answer\)$") as failure:
        mas.answer(
            ["fox"] * 6, batch_size=2, settle=0.9, on_message=change, on_text=lambda row, piece: shown.add(row),
            max_new_tokens=4,
        )  # fmt: skip
    assert len(began) == 2
    assert len(shown) == 1
    assert not shown & failure.value.failed.keys()
    assert not any(answer.text for answer in failure.value.answers)


def test_a_run_and_a_sweep_keep_the_others_and_ask_only_these_again(mas, alone, tmp_path, monkeypatch, capsys):
    mas.save_pretrained(tmp_path / "s")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    asked = ["--mode", "text", "--rounds", "1", "--max-new-tokens", "60", "--batch-size", "3"]
    for words in (["run", "s", "--questions", "rows.jsonl"], ["eval", "s", "--data", "rows.jsonl"]):
        output = tmp_path / words[0]
        for _ in range(2):
            assert main([*words, *asked, "--output", str(output)]) == 2
            err = capsys.readouterr().err
            assert re.fullmatch(f"recmas: error: row 1: {SAID} \\(3 of 8 rows have no answer\\)\n", err)
            lines = list(map(json.loads, output.read_text().splitlines()))
            assert {line["index"]: line["text"] for line in lines} == alone


def test_rows_have_their_own_numbers_wherever_they_are_asked(mas):
    """A batch of an evaluation, a trial's questions in their drawn order, and an audit's batches."""
    rows, asked = [ROWS[0], *ROWS[:1], *ROWS[2:]], {"max_new_tokens": 60, "progress": False}
    with pytest.raises(ValueError, match=f"^row 3: {SAID} \\(2 of 8 rows have no answer\\)$"):
        sweep(mas, rows, modes=["text"], rounds=[1], batch_size=2, **asked)
    with pytest.raises(ValueError, match=f"^row 3: {SAID} \\(2 of 8 rows have no answer\\)$"):
        tune(mas, rows, 1e9, unit="tokens", modes=["text"], rounds=[1], latent_steps=[1], **asked)
    with pytest.raises(ValueError, match=f"^row 3: {SAID}$"):  # the batch of rows 2 and 3
        audit(mas, rows, arms=["text"], batch_size=2, **asked)
