"""``settle``: a question ends as soon as what its last agent sends has settled, with the answer of so many rounds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from recmas import SEQUENTIAL, AnswerOptions, Pattern, RecursiveMAS
from recmas.cli import main
from recmas.engine.messages import Latents
from recmas.evaluation import audit, sweep
from recmas.lab.world import questions
from tests.runtime.tiny import tiny_agent

RELAY = Path(__file__).resolve().parents[3] / "examples" / "relay"
ROUNDS = 4
ROWS = [
    {"question": text} for text in ("what is it?", "fox", "the lazy dog jumps over", "plan and critique", "0 + 1", "!")
]


@pytest.fixture(scope="module")
def relay() -> RecursiveMAS:
    return RecursiveMAS.from_pretrained(RELAY)


def tiny(family: str, **how: Any) -> RecursiveMAS:
    agents = {role: tiny_agent(family, role, 32, seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    pattern = Pattern(SEQUENTIAL.stages, **how)
    return RecursiveMAS.create(agents, pattern, rounds=2, latent_steps=2, seed=1)


def sent(mas: RecursiveMAS, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What the last agent sends in every round but the last one, ``[rows, m * d]`` each."""
    found: list[torch.Tensor] = []

    def keep(visit, message):
        if visit.role == mas.pattern.last:
            assert isinstance(message, Latents)
            found.append(message.states.flatten(1))
        return message

    mas.answer(rows, rounds=ROUNDS, batch_size=1, max_new_tokens=1, on_message=keep)
    by_row = [torch.cat(found[row * (ROUNDS - 1) : (row + 1) * (ROUNDS - 1)]) for row in range(len(rows))]
    return [torch.stack(at) for at in zip(*by_row, strict=True)]


def expected_rounds(mas: RecursiveMAS, rows: list[dict[str, Any]]) -> tuple[float, list[int]]:
    """A threshold that ends some rows after two rounds and leaves others, and the rounds that follow from it by row."""
    each = [cosine_similarity(now, then) for then, now in itertools.pairwise(sent(mas, rows))]
    first = each[0].sort().values
    gaps = first[1:] - first[:-1]
    at = int(gaps.argmax())
    least = float((first[at] + first[at + 1]) / 2)
    rounds = [next((r for r, cos in enumerate(each, start=2) if cos[row] >= least), ROUNDS) for row in range(len(rows))]
    return least, rounds


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text"])
@pytest.mark.parametrize("exchange", ["stage", "all"])
def test_an_answer_is_that_of_the_rounds_it_took(family, exchange):
    mas = tiny(family, exchange=exchange)
    rows = sorted(ROWS, key=lambda row: len(row["question"]))
    least, rounds = expected_rounds(mas, rows)
    assert 2 in rounds
    assert len(set(rounds)) > 1
    ended = []
    answers = mas.answer(
        rows, rounds=ROUNDS, settle=least, max_new_tokens=4, batch_size=len(rows), progress=ended.append, trace=True
    )
    assert sum(ended) == len(rows) * ROUNDS * 3
    assert [answer.rounds for answer in answers] == rounds
    for count in set(rounds):
        fixed = mas.answer(rows, rounds=count, max_new_tokens=4, batch_size=len(rows), trace=True)
        for answer, alone, took in zip(answers, fixed, rounds, strict=True):
            if took == count:
                assert answer.tokens == alone.tokens
                extra = {"solver": 2} if count < ROUNDS else {}  # it thinks before it turns out to have settled
                assert answer.latent_steps == {
                    role: alone.latent_steps.get(role, 0) + extra.get(role, 0) for role in answer.latent_steps
                }
                assert [(one.round, one.source, one.target) for one in answer.handoffs] == [
                    (one.round, one.source, one.target) for one in alone.handoffs
                ]


def test_rows_that_go_on_still_resume_from_their_prefixes(relay: RecursiveMAS):
    rows = questions("validation", 3, (1, 2, 3), 24)
    settled = relay.answer(rows, rounds=ROUNDS, settle=0.98, batch_size=24)
    assert {2, 3, 4} == {answer.rounds for answer in settled}
    last = settled.reading["round 4, critic"]
    assert not last.reason
    assert 0 < last.computed < last.positions / 2
    fixed = relay.answer(rows, rounds=ROUNDS, batch_size=24)
    assert last.positions < fixed.reading["round 4, critic"].positions
    once = relay.answer(rows, rounds=ROUNDS, settle=0.98, batch_size=1, prefix_reuse=False)
    assert [(one.text, one.rounds) for one in once] == [(one.text, one.rounds) for one in settled]


def test_a_text_that_is_the_same_again_is_the_answer(relay: RecursiveMAS):
    rows = questions("validation", 4, (1, 2, 3), 24)
    settled = relay.answer(rows, mode="text", rounds=ROUNDS, settle=1.0, batch_size=24)
    assert [one.rounds for one in settled] == [int(row["hops"]) + 1 for row in rows]
    for count in (2, 3, 4):
        fixed = relay.answer(rows, mode="text", rounds=count, batch_size=24)
        for answer, alone in zip(settled, fixed, strict=True):
            if answer.rounds == count:
                assert (answer.text, answer.tokens, answer.text_tokens) == (alone.text, alone.tokens, alone.text_tokens)


def test_one_round_or_latents_that_never_settle_change_nothing(relay: RecursiveMAS):
    rows = questions("validation", 5, (1, 2), 6)
    for rounds in (1, 3):
        plain, settling = (relay.answer(rows, rounds=rounds, settle=settle) for settle in (None, 1.0))
        assert [one.tokens for one in plain] == [one.tokens for one in settling]
        assert {one.rounds for one in plain} == {rounds}


def test_answers_come_in_pieces_where_they_settle(relay: RecursiveMAS):
    rows = questions("validation", 3, (1, 2, 3), 12)
    whole = relay.answer(rows, rounds=ROUNDS, settle=0.98, batch_size=12)
    pieces: dict[int, str] = dict.fromkeys(range(len(rows)), "")

    def note(row: int, piece: str) -> None:
        pieces[row] += piece

    relay.answer(rows, rounds=ROUNDS, settle=0.98, batch_size=12, on_text=note)
    assert list(pieces.values()) == [answer.text for answer in whole]
    assert len({answer.rounds for answer in whole}) > 1


@pytest.mark.parametrize("settle", [0.0, 1.5, -1.0])
def test_a_settle_that_no_cosine_reaches_or_any_does_is_refused(settle: float):
    with pytest.raises(ValueError, match=r"settle: .* is not in \(0, 1\]"):
        AnswerOptions(settle=settle)


def test_what_cannot_settle_is_refused(relay: RecursiveMAS):
    rows = questions("validation", 5, (1,), 8)
    with pytest.raises(ValueError, match="settle: 'solver' takes 0 latent steps"):
        relay.answer(rows, settle=0.9, latent_steps={"solver": 0})
    with pytest.raises(ValueError, match="settle: in mode 'text' a text is the answer only"):
        relay.answer(rows, mode="text", settle=0.9, on_text=lambda row, piece: None)
    with pytest.raises(ValueError, match="settle: an audit compares"):
        audit(relay, rows, settle=0.9)


def test_rounds_auto_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "rows.jsonl"
    rows = questions("validation", 3, (1, 2), 8)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["run", str(RELAY), "--questions", str(data), "--rounds", "auto", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["answers"]
    assert {one["rounds"] for one in told} == {2, 3}
    output = str(tmp_path / "records.jsonl")
    evaluated = ["eval", str(RELAY), "--data", str(data), "--metric", "last_word", "--output", output, "--json"]
    assert main([*evaluated, "--rounds", "auto"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["latent_steps"] == sum(sum(one["latent_steps"].values()) for one in told) / len(rows)
    assert main([*evaluated, "--rounds", "3"]) == 2  # records of another run
    assert "records" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(RELAY), "--question", "x", "--rounds", "sometimes"])
    assert "--rounds: must be an integer or auto, got 'sometimes'" in capsys.readouterr().err


def test_a_sweep_without_it_has_the_keys_it_had(relay: RecursiveMAS):
    rows = questions("validation", 3, (1,), 2)
    keys = [[one.key for one in sweep(relay, rows, settle=settle, progress=False).records] for settle in (None, 0.5)]
    assert keys[0] != keys[1]
