"""Successive halving under a budget of seconds, on a system whose accuracy and speed are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recmas import RecursiveMAS
from recmas.answering.answers import Answer, Answers
from recmas.cli import main
from recmas.config.pattern import DISTILLATION
from recmas.config.system_json import read_spec
from recmas.evaluation import Cell, tune
from tests.runtime.tiny import tiny_agent

RELAY = Path(__file__).resolve().parents[3] / "examples/relay"
ROWS = [{"question": "?", "number": n, "answer": "yes"} for n in range(64)]


class Known(RecursiveMAS):
    """Right on the first `steps` of every eight questions; a question takes as many seconds as it has rounds.

    The first answer of all takes `warming` seconds more.
    """

    now, warming = 0.0, 0.0

    def answer(self, rows, options):
        self.now += options.rounds * len(rows) + (0 if self.asked else self.warming)
        self.asked.append((options.mode, options.rounds, options.latent_steps, len(rows)))
        return Answers(
            Answer(
                "yes" if row["number"] % 8 < options.latent_steps else "no",
                text_tokens={"learner": 1},
                latent_steps={"expert": options.latent_steps * options.rounds},
            )
            for row in rows
        )


@pytest.fixture
def known():
    agents = {"expert": tiny_agent("llama", "expert"), "learner": tiny_agent("llama", "learner", seed=1)}
    system = Known.create(agents, DISTILLATION, rounds=2, latent_steps=3, seed=0)
    system.asked = []
    return system


def search(system, budget, rows=ROWS, **changes):
    given = {"rounds": (1, 2), "latent_steps": (0, 2, 5, 8), "progress": False, "clock": lambda: system.now}
    return tune(system, rows, budget, **(given | changes))


def test_the_better_half_goes_on_to_twice_as_many_questions(known):
    found = search(known, 1e6)
    assert [count for *_, count in known.asked] == [1] + [8] * 8 + [8] * 4 + [16] * 2 + [32]
    assert found.best == Cell("latent", 1, 8)  # as good as two rounds, in half the time
    assert found.ended == "one candidate was left"
    assert [trial.cell for trial in found.trials[:2]] == [Cell("latent", 1, 8), Cell("latent", 2, 8)]
    assert [len(trial.correct) for trial in found.trials] == [64, 32, 16, 16, 8, 8, 8, 8]
    assert found.trials[0].accuracy.value == 1
    assert found.trials[0].seconds == 1
    assert found.seconds == known.now


def test_no_trial_begins_after_the_budget(known):
    found = search(known, 20)
    assert known.asked[1:] == [("latent", 1, 0, 8), ("latent", 1, 2, 8), ("latent", 1, 5, 8)]
    assert found.ended == "the seconds were used up"
    assert found.best == Cell("latent", 1, 5)
    assert [len(trial.correct) for trial in found.trials] == [8, 8, 8, 0, 0, 0, 0, 0]


def test_no_second_trial_of_the_first_candidate_begins_after_the_budget(known):
    found = search(known, 17, rounds=(1,), latent_steps=(8, 2))
    assert [count for *_, count in known.asked] == [1, 8, 8]
    assert found.ended == "the seconds were used up"
    assert found.best == Cell("latent", 1, 8)


def test_the_slow_first_answer_counts_for_no_candidate(known):
    known.warming = 50.0
    found = search(known, 1e6, latent_steps=(8,))
    assert found.best == Cell("latent", 1, 8)
    assert found.trials[0].seconds == 1
    assert found.seconds == known.now


def test_it_ends_with_the_questions(known):
    found = search(known, 1e6, ROWS[:8])
    assert found.ended == "all questions were asked"
    assert [count for *_, count in known.asked] == [1] + [8] * 8


def test_a_text_system_is_tried_once_per_number_of_rounds(known):
    search(known, 1e6, modes=("latent", "text"))
    first = known.asked[1:11]
    assert [(mode, rounds, steps) for mode, rounds, steps, _ in first[8:]] == [("text", 1, 0), ("text", 2, 0)]


def test_the_seed_orders_the_questions(known):
    rows = [row | {"answer": "yes" if row["number"] < 8 else "other"} for row in ROWS]
    one, same, other = (search(known, 40, rows, seed=seed).trials[0].correct for seed in (0, 0, 1))
    assert one == same != other


def test_a_budget_in_tokens_depends_on_no_clock(known):
    found = search(known, 8 * (1 + 3) + 8 * 3, unit="tokens", latent_steps=(0, 2, 5, 8), rounds=(1,))
    assert known.asked == [("latent", 1, 0, 8), ("latent", 1, 2, 8), ("latent", 1, 5, 8)]  # 8, 24 and 48 tokens
    assert found.ended == "the tokens were used up"
    assert found.tokens == 8 + 24 + 48
    assert [trial.tokens for trial in found.trials] == [48, 24, 8, 0]
    equal = search(known, 1e6, unit="tokens", latent_steps=(8,), rounds=(2, 1))
    assert equal.best == Cell("latent", 1, 8)  # as good in fewer tokens
    with pytest.raises(ValueError, match="budget: 5 tokens are too few: the first trial, of 8 questions, .* 72 tokens"):
        search(known, 5, unit="tokens", latent_steps=(8,))


def test_systems_of_several_patterns_are_tried_beside_each_other(known):
    agents = known.agents
    other = Known.create(agents, DISTILLATION, rounds=2, latent_steps=1, seed=1)
    texts = Known.create(agents, DISTILLATION, links=False)
    other.asked, texts.asked = [], []
    found = search({"one": known, "other": other, "texts": texts}, 1e6, modes=("latent", "text"), clock=lambda: 0.0)
    tried = {(trial.system, trial.cell.mode) for trial in found.trials}
    assert tried == {(name, mode) for name in ("one", "other") for mode in ("latent", "text")} | {("texts", "text")}
    assert {mode for mode, *_ in texts.asked} == {"text"}
    with pytest.raises(ValueError, match="modes: texts has no links, so it can be tried in mode 'text' only"):
        search({"one": known, "texts": texts}, 1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "miles"}, "unit: 'miles' is not one of seconds, tokens"),
        ({"budget": 0}, "budget: 0 seconds, expected more than 0"),
        ({"budget": 9}, "budget: 9 seconds are too few: the first trial, of 8 questions, ended after 9.0 seconds"),
        ({"rows": []}, "rows: expected at least one question, got none"),
        ({"rows": [{"question": "?"}]}, "row 0: no field 'answer'"),
        ({"latent_steps": ()}, "expected at least one of each"),
        ({"modes": ("song",)}, "mode: 'song' is not one of latent, text"),
        ({"metric": "taste"}, "metric must be one of"),
    ],
)
def test_refused(known, changes, message):
    with pytest.raises(ValueError, match=message):
        search(known, **({"budget": 100} | changes))


def test_command_writes_the_defaults(tmp_path, capsys):
    system = tmp_path / "relay"
    shutil.copytree(RELAY, system)
    words = ["tune", str(system), "--data", str(RELAY / "questions.jsonl"), "--metric", "last_word"]
    words += ["--rounds", "1,3", "--latent-steps", "1,2", "--budget", "60"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] is None
    best = found["trials"][0]
    assert (best["rounds"], best["steps"]) == (3, 2)
    assert read_spec(system).agents["solver"].latent_steps == 3
    assert main([*words, "--write"]) == 0
    assert "rounds 3 and 2 latent steps for all agents are the defaults now" in capsys.readouterr().out
    spec = read_spec(system)
    assert (spec.defaults.rounds, spec.defaults.latent_steps) == (3, 2)
    assert {agent.latent_steps for agent in spec.agents.values()} == {None}
    RecursiveMAS.from_pretrained(system)  # every checksum still holds


def test_command_tries_other_systems_and_writes_into_the_best(tmp_path, capsys):
    systems = [tmp_path / name for name in ("one", "two")]
    for system in systems:
        shutil.copytree(RELAY, system)
    before = (systems[1] / "system.json").read_bytes()
    words = ["tune", str(systems[0]), "--others", str(systems[1]), "--data", str(RELAY / "questions.jsonl")]
    words += ["--metric", "last_word", "--rounds", "3", "--latent-steps", "1,2"]
    words += ["--budget", "4000", "--budget-unit", "tokens", "--write"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("system")
    assert f"{systems[0]}: rounds 3 and 2 latent steps" in printed
    assert read_spec(systems[0]).defaults.latent_steps == 2
    assert (systems[1] / "system.json").read_bytes() == before


def test_command_refuses_to_write_what_it_does_not_try(capsys, monkeypatch):
    monkeypatch.setattr(RecursiveMAS, "from_pretrained", lambda *args, **options: pytest.fail("a system was loaded"))
    words = ["tune", str(RELAY), "--data", str(RELAY / "questions.jsonl"), "--budget", "9", "--mode", "text", "--write"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "recmas: error: --write: no latent candidate is asked for, and a system's defaults hold no other\n"
    )


def test_command_refuses_a_budget_for_no_trial(capsys):
    words = ["tune", str(RELAY), "--data", str(RELAY / "questions.jsonl"), "--budget", "1e-9"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("recmas: error: budget: 1e-09 seconds are too few: the first trial, of 8 ")
    assert len(printed.err.splitlines()) == 1
