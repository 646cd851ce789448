"""The outer stage on tiny random agents, against a loop by hand."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from recmas.config.pattern import SEQUENTIAL, Pattern
from recmas.config.system_json import PromptSpec
from recmas.recursive_mas import RecursiveMAS
from recmas.training import OuterConfig, answer, outer_loss, train_outer
from tests.runtime.tiny import tiny_agent
from tests.runtime.training.by_hand import (
    PROMPTS,
    RAGGED,
    ROUNDING,
    ROWS,
    STEPS,
    build,
    changed,
    embeds,
    ids,
    link,
    states,
    text_of,
    weights,
)


def with_slot(system, source, target, before, latents, after):
    mapped = link(system.outer_links[source, target], latents, "outer")
    return torch.cat([embeds(system, target, before), mapped, embeds(system, target, after)])


def forced_latents(system, role, prompt, text):
    tokens = [*ids(system, role, text), system.agents[role].tokenizer.eos_token_id][: STEPS[role]]
    table = system.agents[role].model.get_input_embeddings()
    sequence = torch.cat([prompt, table(torch.tensor(tokens[:-1], dtype=torch.long))])
    return link(system.inner_links[role], states(system, role, sequence)[len(prompt) - 1 :], "inner")


def rolled_out_latents(system, role, prompt, text):
    latents = []
    for _ in range(STEPS[role]):
        latents.append(link(system.inner_links[role], states(system, role, prompt)[-1], "inner"))
        prompt = torch.cat([prompt, latents[-1][None]])
    return torch.stack(latents)


def plain_outer_loss(system, rows, rounds, think):
    """Sum of the answers' negative log likelihoods over their number of tokens."""
    total, count = 0.0, 0
    for row in rows:
        latents = None
        for round in range(1, rounds + 1):
            if round == 1:
                prompt = embeds(system, "planner", f"<bos> {row['sheet']} <in> {row['question']} <out>")
            else:
                prompt = with_slot(system, "solver", "planner", f"<bos> {row['sheet']} <in> ", latents, " <out>")
            latents = think(system, "planner", prompt, text_of(row, "planner", round))
            prompt = with_slot(system, "planner", "critic", "<bos> <in> ", latents, " <out>")
            latents = think(system, "critic", prompt, text_of(row, "critic", round))
            prompt = with_slot(system, "critic", "solver", f"<bos> {row['question']} <in> ", latents, " <out>")
            if round < rounds:
                latents = think(system, "solver", prompt, text_of(row, "solver", round))
        loss, tokens = answer_loss(system, prompt, text_of(row, "solver", rounds))
        total, count = total + loss, count + tokens
    return total / count


def answer_loss(system, prompt, text):
    """Of the solver's answer, its end included: the sum of the tokens' negative log likelihoods, and their number."""
    said = [*ids(system, "solver", text), system.agents["solver"].tokenizer.eos_token_id]
    model = system.agents["solver"].model
    sequence = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(said[:-1], dtype=torch.long))])
    logits = model(inputs_embeds=sequence[None]).logits[0, len(prompt) - 1 :]
    return -logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum(), len(said)


def outer_gradients(system, loss):
    parameters = [p for outer in system.outer_links.values() for p in outer.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("latents", ["forced", "rollout"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_unrolled_loss_and_gradients_equal_the_plain_loop(exact, rounds, latents):
    think = forced_latents if latents == "forced" else rolled_out_latents
    expected = plain_outer_loss(exact, RAGGED, rounds, think)
    loss = outer_loss(exact, RAGGED, rounds, latent_steps=STEPS, latents=latents)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
    for a, b in zip(outer_gradients(exact, loss), outer_gradients(exact, expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())
    used = [g is not None for g in outer_gradients(exact, outer_loss(exact, RAGGED, rounds, latent_steps=STEPS))]
    assert all(used) == (rounds > 1)


def test_logits_made_in_parts_give_the_same_loss_and_gradients(exact, monkeypatch):
    loss = outer_loss(exact, RAGGED, 2, latent_steps=STEPS)
    monkeypatch.setattr(answer, "LEAST_ROWS", 3)  # three rows at a time at most, of seven
    monkeypatch.setattr(answer, "LOGITS", {"cpu": 1})
    parted = outer_loss(exact, RAGGED, 2, latent_steps=STEPS, recompute=True)
    torch.testing.assert_close(parted, loss, rtol=ROUNDING, atol=0)
    for a, b in zip(outer_gradients(exact, parted), outer_gradients(exact, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())


def test_no_latent_steps_leave_an_empty_slot(exact):
    loss = outer_loss(exact, RAGGED, 1, latent_steps={"planner": 2, "critic": 0})
    total, count = 0.0, 0
    for row in RAGGED:
        prompt = torch.cat(
            [embeds(exact, "solver", f"<bos> {row['question']} <in> "), embeds(exact, "solver", " <out>")]
        )
        loss_of_row, tokens = answer_loss(exact, prompt, text_of(row, "solver", 1))
        total, count = total + loss_of_row, count + tokens
    torch.testing.assert_close(loss, total / count, rtol=ROUNDING, atol=0)


def test_outer_training_learns_and_touches_outer_links_only():
    system = build()
    before = weights(system)
    config = OuterConfig(steps=40, batch_size=2, warmup_steps=2, rounds=2, latent_steps=STEPS, learning_rate=1e-2)
    with pytest.warns(UserWarning, match="learning_rate 0.01 through 2 rounds"):
        result = train_outer(system, ROWS, config, progress=False)
    assert changed(before, weights(system)) == {"planner->critic", "critic->solver", "solver->planner"}
    assert result.loss < 0.9 * result.records[0].loss


def test_one_round_trains_the_edges_it_uses_at_any_rate():
    system = build()
    before = weights(system)
    config = OuterConfig(steps=2, batch_size=2, rounds=1, learning_rate=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_outer(system, ROWS, config, progress=False)
    assert changed(before, weights(system)) == {"planner->critic", "critic->solver"}
    before = weights(system)
    train_outer(system, ROWS, config, edges=[("critic", "solver")], progress=False)
    assert changed(before, weights(system)) == {"critic->solver"}


def test_outer_training_resumes_bit_for_bit(tmp_path):
    config = OuterConfig(steps=6, batch_size=1, rounds=(1, 2), checkpoint_every=2, accumulation=2)
    whole, parts = build(), build()
    train_outer(whole, ROWS, config, output=tmp_path / "whole", progress=False)
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, on_step=lambda r: r.step == 3)
    parts = build()
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, resume=True)
    assert changed(weights(whole), weights(parts)) == set()
    logs = [(tmp_path / name / "outer" / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_training_with_packed_links_resumes_bit_for_bit(tmp_path):
    """The frozen inner links are packed in the first steps; a resumed run begins with them unpacked."""
    made = {role: tiny_agent("llama", role, 64, seed) for seed, role in enumerate(SEQUENTIAL.roles)}

    def fresh():
        system = RecursiveMAS.create(made, SEQUENTIAL, prompts=PROMPTS, rounds=2, latent_steps=2, seed=0)
        assert all(p.numel() >= 4096 for inner in system.inner_links.values() for p in inner.parameters() if p.ndim > 1)
        return system

    config = OuterConfig(steps=5, batch_size=2, rounds=2, checkpoint_every=0, learning_rate=1e-4)
    whole, parts = fresh(), fresh()
    expected = train_outer(whole, ROWS, config, output=tmp_path / "whole", progress=False)
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, on_step=lambda r: r.step == 3)
    parts = fresh()
    result = train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, resume=True)
    assert changed(weights(whole), weights(parts)) == set()
    assert [record.loss for record in result.records] == [record.loss for record in expected.records]


def test_weighted_slots_learn_their_scores_too(tmp_path):
    pattern = Pattern((("planner", "critic"), ("solver",)), combine="weighted")
    prompts = {
        "planner": PromptSpec("<bos> {{question}} <out>"),
        "critic": PromptSpec("<bos> {{question}} <out>"),
        "solver": PromptSpec("<bos> {{from:planner,critic}} <out>"),
    }
    system = build(pattern, prompts, rounds=1)
    before = weights(system)
    rows = [dict(row, targets=dict(row["targets"], critic="1 cat dog")) for row in ROWS]
    rows = [dict(row, targets=dict(row["targets"], planner="2 red blue")) for row in rows]
    config = OuterConfig(steps=3, batch_size=2, rounds=1, weight_decay=0.1)
    train_outer(system, rows, config, output=tmp_path, progress=False)
    edges = {("planner", "solver"), ("critic", "solver")}
    assert changed(before, weights(system)) == {"->".join(e) for e in edges} | {str(e) for e in edges}
    again = build(pattern, prompts, rounds=1)
    train_outer(again, rows, config, output=tmp_path, progress=False, resume=True)
    assert changed(weights(system), weights(again)) == set()
