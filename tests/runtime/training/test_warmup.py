"""The warm-up on tiny random agents, against a loop by hand, and the tokens of two tokenizers that it aligns."""

from __future__ import annotations

import pytest
import torch

from recmas.training import WarmupConfig, train_warmup, warmup_loss
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
