"""The warm-up on tiny random agents, against a loop by hand, and the tokens of two tokenizers that it aligns."""

from __future__ import annotations

import math
import signal
from dataclasses import replace

import pytest
import torch

from recmas.config.pattern import MIXTURE
from recmas.training import WarmupConfig, alignment, train_warmup, warmup, warmup_loss
from recmas.training.checkpoint import load
from recmas.training.counterparts import aligned_tokens, overlaps
from tests.runtime.training.by_hand import (
    ROUNDING,
    ROWS,
    build,
    changed,
    embeds,
    link,
    states,
    text_of,
    tokenizer,
    weights,
)
from tests.runtime.training.test_patterns import PATTERNS


def test_overlaps_follow_characters():
    assert overlaps([(0, 4), (5, 9)], [(0, 2), (2, 6), (7, 9)]) == [[0, 1], [1, 2]]
    assert overlaps([(0, 0), (2, 3)], [(0, 3), (1, 1)]) == [[], [0]]


def test_tokens_of_two_tokenizers_are_aligned_both_ways():
    words, pieces = tokenizer(False), tokenizer(True)
    groups, ids = aligned_tokens(words, pieces, ["1 bako", "red", "1 nope cat", ""])
    assert [pieces.convert_ids_to_tokens(row) for row in ids][:2] == [["1", "ba", "##ko"], ["re", "##d"]]
    assert groups == [[[0], [1, 2]], [[0, 1]], [[0], [], [2]], []]  # unknown words stand for nothing
    groups, ids = aligned_tokens(pieces, words, ["1 bako", "0 blue <eos>"])
    assert groups == [[[0], [1], [1]], [[0], [1], []]]


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="object reports no character offsets"):
        aligned_tokens(tokenizer(False), object(), ["1"])


@pytest.mark.parametrize("edge", [("critic", "solver"), ("solver", "planner")])
def test_warmup_loss_is_the_formula(exact, edge):
    source, target = edge
    rows = [dict(row, targets=dict(row["targets"], critic="1 bako", solver="2 dilo")) for row in ROWS]
    rows[1]["targets"] = dict(rows[1]["targets"], critic="red cat", solver="remu")
    # by hand: which of the receiver's tokens each of the sender's tokens stands for
    counterparts = {
        ("critic", "solver"): [[["1"], ["ba", "##ko"]], [["re", "##d"], ["cat"]]],
        ("solver", "planner"): [[["2"], ["dilo"], ["dilo"]], [["remu"], ["remu"]]],
    }[edge]
    receiver = exact.agents[target]
    table = receiver.model.get_input_embeddings().weight
    terms = []
    for row, groups in zip(rows, counterparts, strict=True):
        before = "<bos>" if source == "critic" else f"<bos> {row['question']}"
        heard = text_of(row, "planner", 1) if source == "critic" else row["targets"]["critic"]
        prompt = embeds(exact, source, f"{before} <in> {heard} <out>")
        text = embeds(exact, source, row["targets"][source])
        hidden = states(exact, source, torch.cat([prompt, text]))[len(prompt) - 1 : -1]
        pred = link(exact.outer_links[edge], link(exact.inner_links[source], hidden, "inner"), "outer")
        for p, group in zip(pred, groups, strict=True):
            e = table[receiver.tokenizer.convert_tokens_to_ids(group)].mean(dim=0)
            terms.append(1 - p @ e / (p.norm() * e.norm()))
    torch.testing.assert_close(warmup_loss(exact, edge, rows), sum(terms) / len(terms), rtol=ROUNDING, atol=0)


def test_messages_without_counterparts_give_no_loss(exact):
    rows = [dict(row, targets={"planner": "1", "critic": "nope never"}) for row in ROWS]
    loss = warmup_loss(exact, ("critic", "solver"), rows)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, list(exact.outer_links["critic", "solver"].parameters()), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)


def test_warmup_learns_and_touches_the_chosen_edge_only():
    system = build()
    before = weights(system)
    config = WarmupConfig(steps=40, batch_size=2, learning_rate=1e-2, warmup_steps=2, rounds=3)
    results = train_warmup(system, ROWS, config, edges=[("critic", "solver")], progress=False)
    assert changed(before, weights(system)) == {"critic->solver"}
    result = results["critic", "solver"]
    assert result.loss < 0.5 * result.records[0].loss


def test_links_of_one_sender_share_a_pass_and_are_those_trained_one_by_one(monkeypatch, tmp_path):
    config = WarmupConfig(steps=3, batch_size=1, accumulation=2, learning_rate=1e-2, rounds=(1, 2), checkpoint_every=0)
    said = [dict(row, targets={role: ["1 red", f"blue {n}"] for role in MIXTURE.roles}) for n, row in enumerate(ROWS)]
    read, speak = [], alignment.speak
    monkeypatch.setattr(alignment, "speak", lambda agent, said: read.append(agent.name) or speak(agent, said))
    apart, shared = (build(*PATTERNS["mixture"]) for _ in range(2))
    edges = [edge for edge in apart.outer_links if edge[0] == "summarizer"]
    for edge in edges:
        train_warmup(apart, said, config, edges=[edge], progress=False)
    assert read == ["summarizer"] * 3 * 2 * len(edges)
    read.clear()

    records = []

    def asks_to_end(record):
        records.append(record)
        if len(records) == len(edges) + 1:  # after the second step of the first link
            signal.raise_signal(signal.SIGINT)

    options = {"edges": edges, "output": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train_warmup(shared, said, config, on_step=asks_to_end, **options)
    assert {load(tmp_path / f"warmup-summarizer-{target}").step for _, target in edges} == {2}
    assert read == ["summarizer"] * 2 * 2
    train_warmup(shared, said, config, resume=True, **options)
    assert read == ["summarizer"] * 3 * 2
    assert not changed(weights(apart), weights(shared))


def test_a_link_whose_loss_is_not_finite_ends_alone(monkeypatch, tmp_path):
    config = WarmupConfig(steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=1, schedule="constant")
    said = [dict(row, targets=dict.fromkeys(MIXTURE.roles, "1 red")) for row in ROWS]
    apart, shared = (build(*PATTERNS["mixture"]) for _ in range(2))
    bad, *others = [edge for edge in apart.outer_links if edge[0] == "summarizer"]
    assert len(others) > 1
    real, calls = warmup.warmup_alignment, []

    def broken(counterparts, system, edge, *rest, **weights):
        calls.append(edge)
        return real(counterparts, system, edge, *rest, **weights) * (
            math.nan if calls.count(edge) == 3 and edge == bad else 1
        )

    expected = train_warmup(apart, said, config, edges=others, progress=False)
    train_warmup(apart, said, replace(config, steps=2), edges=[bad], progress=False)
    monkeypatch.setattr(warmup, "warmup_alignment", broken)
    options = {"edges": [bad, *others], "output": tmp_path, "progress": False}
    error = rf"^warmup-summarizer-{bad[1]}, step 3, batch 2: loss nan, .* no checkpoint before it; the others went on$"
    with pytest.raises(FloatingPointError, match=error):
        train_warmup(shared, said, config, **options)
    assert not changed(weights(apart), weights(shared))
    assert {load(tmp_path / f"warmup-summarizer-{target}").step for _, target in others} == {4}
    monkeypatch.setattr(warmup, "warmup_alignment", real)
    found = train_warmup(shared, said, config, resume=True, **options)
    assert {edge: found[edge].steps for edge in expected} == dict.fromkeys(expected, 4)


def test_links_that_share_a_pass_begin_where_those_trained_one_by_one_do(capsys):
    """To fit a link, texts run outside of autocast; the first step's have to run within, although they are the same."""
    config = WarmupConfig(steps=1, batch_size=2, link_init="ridge", precision="bfloat16")
    said = [dict(row, targets=dict.fromkeys(MIXTURE.roles, "1 red")) for row in ROWS]
    apart, shared = (build(*PATTERNS["mixture"]) for _ in range(2))
    edges = [edge for edge in apart.outer_links if edge[0] == "summarizer"]
    for edge in edges:
        train_warmup(apart, said, config, edges=[edge], progress=False)
    train_warmup(shared, said, config, edges=edges, progress="always")
    assert not changed(weights(apart), weights(shared))
    shown = capsys.readouterr().err
    assert "warmup-summarizer-math" in shown
    assert "\x1b" not in shown  # bars of several runs move no cursor in a file
