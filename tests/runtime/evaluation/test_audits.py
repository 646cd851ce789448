"""The audit: its endpoints, its verdict, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recmas import SEQUENTIAL, Pattern, RecursiveMAS
from recmas.cli import main
from recmas.evaluation import ARMS, audit, sweep, wilson
from recmas.evaluation.audits import gold_nll
from recmas.evaluation.findings import Outcome, decide, summed
from recmas.evaluation.paired import Difference, detectable_mean, detectable_share, paired_shares
from recmas.prompts.jsonl import read_rows
from tests.runtime.tiny import prompts, tiny_agent

RELAY = Path(__file__).resolve().parents[3] / "examples/relay"
ROWS = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(9)]


@pytest.fixture(scope="module")
def untrained():
    agents = {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)


@pytest.fixture(scope="module")
def relay():
    return RecursiveMAS.from_pretrained(RELAY)


@pytest.fixture(scope="module")
def found(relay):
    rows = read_rows(RELAY / "questions.jsonl")
    return audit(relay, rows, questions=30, seed=5, metric="last_word", batch_size=10, progress=False)


def ask(system, rows=ROWS, **changes):
    return audit(system, rows, **{"max_new_tokens": 3, "progress": False, **changes})


def by_name(found):
    return {one.arm: one for one in found.arms}


def test_the_relay_lives_by_what_its_latents_say(found):
    assert found.verdict == "content matters"
    assert [one.arm for one in found.arms] == list(ARMS)
    arms = by_name(found)
    for name in ("identity", "random", "shuffled", "noise", "zeros", "no latents"):
        assert arms[name].accuracy.value < 0.4, name
        assert arms[name].accuracy_difference.high < 0, name
        assert arms[name].nll_difference.low > 1, name
        assert arms[name].changed > 0.5, name
    assert arms["trained"].accuracy.value > 0.9
    assert arms["text"].accuracy.value > 0.9
    assert arms["trained"].accuracy_difference is None
    assert arms["trained"].changed == 0
    assert "accuracy changes by -0." in found.reason
    assert 0 < found.detectable_accuracy_at_best < found.detectable_accuracy < 1


def test_what_shows_depends_on_trained_and_shuffled(found):
    pairs = list(zip(*(by_name(found)[name].outcomes for name in ("trained", "shuffled")), strict=True))
    changes = sum(one.correct != other.correct for one, other in pairs)
    assert found.detectable_accuracy == detectable_share(30, changes)
    assert found.detectable_accuracy_at_best == detectable_share(30, 0)
    assert found.detectable_nll == detectable_mean([other.nll - one.nll for one, other in pairs])


def test_an_arm_is_summed_question_by_question():
    first = [Outcome("a", True, 1.0), Outcome("b", True, 2.0), Outcome("c", False, 3.0), Outcome("d", True, 2.0)]
    second = [Outcome("a", True, 2.0), Outcome("x", False, 3.0), Outcome("c", False, 5.0), Outcome("y", False, 2.0)]
    one, alone = summed("zeros", second, first, 2.0, 0), summed("trained", first, None, 2.0, 0)
    assert (one.accuracy.value, one.nll, one.changed, one.seconds) == (0.25, 3.0, 0.5, 0.5)
    assert (one.accuracy.low, one.accuracy.high) == wilson(1, 4)
    assert one.accuracy_difference == paired_shares([True, True, False, True], [True, False, False, False])
    assert one.accuracy_difference.value == -0.5
    assert one.nll_difference.value == 1.0
    assert (alone.changed, alone.accuracy_difference, alone.nll_difference) == (0, None, None)


def test_messages_of_round_1_answer_the_questions_of_one_hop_alone(found, relay):
    rows = read_rows(RELAY / "questions.jsonl")
    outcomes = by_name(found)["round 1"].outcomes
    one_hop = [a.correct for a, index in zip(outcomes, found.indices, strict=True) if rows[index]["hops"] == 1]
    more = [a.correct for a, index in zip(outcomes, found.indices, strict=True) if rows[index]["hops"] > 1]
    assert sum(one_hop) / len(one_hop) > 0.8
    assert sum(more) / len(more) < 0.5


def test_decisions_are_those_of_a_sweep(found, relay):
    rows = [read_rows(RELAY / "questions.jsonl")[index] for index in found.indices]
    records, _ = sweep(relay, rows, metric="last_word", modes=["latent", "text"], progress=False)
    for name, mode in (("trained", "latent"), ("text", "text")):
        cell = [record for record in records if record.mode == mode]
        outcomes = by_name(found)[name].outcomes
        assert [(one.text, one.correct) for one in outcomes] == [(record.text, record.correct) for record in cell]


def test_the_nll_is_that_of_the_whole_sequence():
    agent = tiny_agent("qwen2", seed=4)
    batch, singles = prompts(agent, (5, 9, 2))
    texts = ["fox", "the lazy dog jumps", "plan"]
    for nll, single, text in zip(gold_nll(agent, batch, texts), singles, texts, strict=True):
        ids = agent.tokenizer(text, add_special_tokens=False)["input_ids"]
        embeds = torch.cat([single, agent.embed(torch.tensor([ids]))], dim=1)
        with torch.no_grad():
            logits = agent.model(inputs_embeds=embeds).logits[0].double().log_softmax(-1)
        first = single.shape[1] - 1
        expected = -sum(logits[first + place, token].item() for place, token in enumerate(ids))
        assert nll == pytest.approx(expected, abs=1e-3)


def test_the_gold_text_is_the_target_of_the_last_round(untrained):
    rounds = [{**row, "targets": {"solver": ["?", row["answer"]]}} for row in ROWS]
    swapped = [{**row, "targets": {"solver": [row["answer"], "?"]}} for row in ROWS]
    plain, same, other = (ask(untrained, rows, arms=[]).arms[0].nll for rows in (ROWS, rounds, swapped))
    assert plain == same != other


def test_batches_change_nothing_of_an_arm_without_shuffles(untrained):
    small, large = (ask(untrained, arms=["zeros"], batch_size=size) for size in (2, 32))
    for name in ("trained", "zeros"):
        one, other = by_name(small)[name], by_name(large)[name]
        assert [a.text for a in one.outcomes] == [a.text for a in other.outcomes]
        assert [a.nll for a in one.outcomes] == pytest.approx([a.nll for a in other.outcomes], abs=1e-4)


def test_the_verdict_depends_on_what_counts_as_a_difference(untrained):
    """All answers are wrong in every arm, so decisions never differ; nine questions show little of that."""
    unsure = ask(untrained, arms=[], margin=0.05, nll_margin=1e-9)
    difference = by_name(unsure)["shuffled"].accuracy_difference
    assert (difference.value, difference.p) == (0, 1)
    cost = by_name(unsure)["shuffled"].nll_difference
    assert unsure.verdict == ("content matters" if cost.shown else "cannot be told with 9 questions")
    least = 1.01 * max(difference.high, -difference.low)
    most = 1.01 * max(abs(cost.low), abs(cost.high))
    assert ask(untrained, arms=[], margin=least, nll_margin=most).verdict == "content does not matter"
    assert ask(untrained, arms=[], margin=0.98 * least, nll_margin=most).verdict != "content does not matter"
    assert ask(untrained, arms=[], margin=least, nll_margin=0.98 * most).verdict != "content does not matter"


BELOW, ABOVE = Difference(-0.01, -0.04, 0.04), Difference(0.01, -0.06, 0.04)
NONE, MOVED = replace(BELOW, p=0.03), replace(ABOVE, p=0.025)


@pytest.mark.parametrize(
    ("decision", "cost", "verdict"),
    [
        (NONE, BELOW, "content does not matter"),
        (replace(NONE, p=0.001), replace(BELOW, low=0.001), "content does not matter"),  # shown, and too small to count
        (NONE, ABOVE, "cannot be told with 3 questions"),
        (replace(ABOVE, p=0.03), BELOW, "cannot be told with 3 questions"),
        (MOVED, BELOW, "content matters"),
        (NONE, Difference(1.0, 0.001, 2.0), "content matters"),
        (NONE, Difference(-1.0, -2.0, -0.001), "content matters"),
    ],
)
def test_the_verdict_follows_from_two_intervals_and_p(decision, cost, verdict):
    outcomes = [Outcome("", False, 1.0)] * 3
    shuffled = replace(summed("shuffled", outcomes, None, 0.0, 0), accuracy_difference=decision, nll_difference=cost)
    assert decide(shuffled, 0.05, 0.05)[0] == verdict


def test_the_questions_are_drawn_by_the_seed(untrained):
    first, again, other = (ask(untrained, arms=[], questions=7, seed=seed) for seed in (1, 1, 2))
    assert first.indices == again.indices != other.indices
    assert [one.outcomes for one in first.arms] == [one.outcomes for one in again.arms]
    assert first.questions == 7


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS[:6], {}, "questions: 6 are too few; fewer than 7 show nothing even if every decision changes"),
        (ROWS, {"questions": 10}, "questions: 10 were asked for, there are 9"),
        ([{"question": "?"}] * 8, {}, "row 0: no field 'answer' with the answer"),
        ([{"riddle": "?", "answer": "!"}] * 8, {}, "row 0: .*'question'"),
        ([{**ROWS[0], "targets": {"solver": " "}}] * 8, {}, "row 0: the target of agent 'solver' in round 2 is empty"),
        (ROWS, {"arms": ["silence"]}, "arms: 'silence' is not one of trained, identity"),
        (ROWS, {"batch_size": "auto"}, "batch_size: an audit shuffles messages within a batch"),
        (ROWS, {"latent_steps": 0}, "system: no latents pass between its agents"),
        (ROWS, {"margin": 0.0}, "margin, nll_margin: expected positive numbers, got 0.0 and 0.1"),
        (ROWS, {"metric": "taste"}, "metric must be one of"),
        (ROWS, {"rounds": 0}, "rounds: 0"),
    ],
)
def test_refused_before_any_model_runs(untrained, monkeypatch, rows, changes, message):
    monkeypatch.setattr(RecursiveMAS, "answer", lambda *args, **options: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        ask(untrained, rows, **changes)


def test_one_agent_has_nothing_to_audit():
    alone = RecursiveMAS.create({"solver": tiny_agent("llama")}, Pattern((("solver",),)), rounds=1)
    with pytest.raises(ValueError, match="system: no latents pass between its agents"):
        ask(alone)


def test_command(capsys):
    words = ["audit", str(RELAY), "--data", str(RELAY / "questions.jsonl"), "--metric", "last_word"]
    assert main([*words, "--questions", "8", "--rounds", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["questions"] == 8
    assert printed["left_out"] == {"round 1": "there is one round only"}
    assert len(printed["arms"][0]["outcomes"]) == 8
    assert main([*words, "--questions", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:10]] == list(ARMS)
    assert lines[-1].startswith("verdict: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1 bako", "answer": "dilo"}, "row 0: "),  # another task: no sheets
        ({"question": "1 bako"}, "row 0: no field 'answer' with the answer"),
    ],
)
def test_command_refuses_in_one_line(capsys, tmp_path, row, message):
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 8)
    assert main(["audit", str(RELAY), "--data", str(data)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
