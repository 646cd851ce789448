"""What the three stages have in common: settings, rows, precision, and what is refused before any step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recmas.training import (
    InnerConfig,
    OuterConfig,
    WarmupConfig,
    inner_loss,
    outer_loss,
    train_inner,
    train_outer,
    train_warmup,
    warmup_loss,
)
from recmas_kernels import use_backend
from tests.runtime.training.by_hand import RAGGED, ROUNDING, ROWS, STEPS, build, ids, text_of


def test_only_the_first_tokens_count_where_asked(exact):
    rows = [dict(row, targets={"planner": "1", "critic": "1 cat dog"}) for row in ROWS]
    short = [dict(row, targets={"planner": "1", "critic": "1"}) for row in ROWS]
    edge = ("critic", "solver")
    loss = warmup_loss(exact, edge, rows, max_tokens=1)
    torch.testing.assert_close(loss, warmup_loss(exact, edge, short), rtol=ROUNDING, atol=0)
    loss = inner_loss(exact, "critic", rows, max_tokens=1)
    torch.testing.assert_close(loss, inner_loss(exact, "critic", short, max_tokens=1), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("latents", ["forced", "rollout"])
def test_the_log_counts_what_agents_read_and_say(latents):
    system, row = build(), ROWS[0]
    read = {
        "planner": f"<bos> {row['sheet']} <in> {row['question']} <out>",
        "critic": "<bos> <in> <out>",
        "solver": f"<bos> {row['question']} <in> <out>",
    }
    prompts = sum(len(ids(system, role, text)) for role, text in read.items())
    said = {role: len(ids(system, role, text_of(row, role, 1))) + 1 for role in system.pattern.roles}
    sent = {"planner": min(STEPS["planner"], said["planner"]), "critic": min(STEPS["critic"], said["critic"])}
    if latents == "rollout":
        sent = {"planner": STEPS["planner"], "critic": STEPS["critic"]}
    config = OuterConfig(steps=1, batch_size=1, rounds=1, latent_steps=STEPS, latents=latents)
    result = train_outer(system, [row], config, progress=False)
    assert result.records[0].tokens == prompts + 2 * sum(sent.values()) + said["solver"]  # sent, and read in a slot
    inner = train_inner(system, [row], InnerConfig(steps=1, batch_size=1), progress=False)
    assert {role: done.records[0].tokens for role, done in inner.items()} == said


def all_losses(system):
    inner, warmup = inner_loss(system, "critic", RAGGED), warmup_loss(system, ("critic", "solver"), RAGGED)
    return [inner, warmup, outer_loss(system, RAGGED, 2, latent_steps=STEPS)]


def test_float32_masters_learn_beside_bfloat16_agents(exact):
    """Their losses stay within the kernels' budget: twice the error of eager torch, and one rounding."""
    expected = torch.stack(all_losses(exact)).detach()
    system = build()
    for a in system.agents.values():
        a.to(torch.bfloat16)
    with use_backend("reference"):
        eager = torch.stack(all_losses(system)).detach()
    losses = all_losses(system)
    assert all(loss.dtype == torch.float32 for loss in losses)
    scale = expected.abs().max()
    figure, plain = ((found - expected).abs().max() / scale for found in (torch.stack(losses).detach(), eager))
    assert figure <= 2 * plain + torch.finfo(torch.bfloat16).eps
    losses[2].backward()
    gradients = [p.grad for outer in system.outer_links.values() for p in outer.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


# ---- bad input


def test_missing_parts_are_named_before_any_step():
    system = build(rounds=1)
    with pytest.raises(ValueError, match="solver->planner"):
        train_outer(system, ROWS, OuterConfig(rounds=2), progress=False)
    with pytest.raises(ValueError, match="edges: solver->planner is not used by 1 rounds"):
        train_outer(system, ROWS, OuterConfig(rounds=1), edges=[("solver", "planner")], progress=False)
    with pytest.raises(ValueError, match="edges: there is no outer link solver->planner"):
        train_warmup(system, ROWS, edges=[("solver", "planner")], progress=False)
    with pytest.raises(ValueError, match="roles: 'solver' has no inner link, only planner, critic"):
        train_inner(system, ROWS, roles=["solver"], progress=False)
    with pytest.raises(ValueError, match="latent_steps: unknown role 'poet'"):
        train_outer(system, ROWS, OuterConfig(rounds=1, latent_steps={"poet": 1}), progress=False)
    with pytest.raises(ValueError, match="latents must be 'forced' or 'rollout', got 'dream'"):
        OuterConfig(latents="dream")


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (OuterConfig, "rounds", 0),
        (OuterConfig, "rounds", ()),
        (InnerConfig, "rounds", (1, -1)),
        (InnerConfig, "cosine_weight", -1.0),
        (InnerConfig, "cosine_weight", float("nan")),
        (InnerConfig, "mse_weight", float("inf")),
        (WarmupConfig, "cosine_weight", 0.0),
        (WarmupConfig, "max_tokens", 0),
        (OuterConfig, "round_weights", (1.0,)),
        (OuterConfig, "round_weights", (1.0, 1.0, 0.0)),
        (OuterConfig, "round_weights", (1.0, float("nan"), 1.0)),
    ],
)
def test_settings_are_checked(config, field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


@pytest.mark.parametrize(
    ("train", "config"),
    [(train_inner, InnerConfig), (train_warmup, WarmupConfig), (train_outer, OuterConfig)],
)
def test_all_rows_are_looked_at_before_the_first_step(exact, tmp_path, train, config):
    lacking = dict(ROWS[1], targets=dict(ROWS[1]["targets"], critic=["dog"]))
    rows = [ROWS[0]] * 20 + [lacking]
    with pytest.raises(ValueError, match="row 20: targets of 'critic' cover 1 rounds, round 2 is needed"):
        train(exact, rows, config(steps=1, batch_size=1, rounds=(1, 2)), output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_only_the_texts_that_are_forced_are_asked_for():
    system = build()
    rows = [dict(row, targets={"solver": row["targets"]["solver"][:2]}) for row in ROWS]
    config = OuterConfig(steps=1, batch_size=1, rounds=2, latents="rollout")
    assert train_outer(system, rows, config, progress=False).steps == 1
    for row in rows:
        row["targets"]["solver"] = [None, "dog"]
    assert train_outer(system, rows, replace(config, round_weights=(0.0, 2.0)), progress=False).steps == 1
    with pytest.raises(ValueError, match="row 0: expected the target of agent 'solver' to be text, got None"):
        train_outer(system, rows, replace(config, round_weights=(0.1, 1.0)), progress=False)


def test_rows_without_what_a_stage_needs_are_named(exact):
    rows = [ROWS[0], dict(ROWS[1], targets={"planner": "1", "solver": ["0"]})]
    with pytest.raises(ValueError, match="row 1: targets has no text for agent 'critic'"):
        outer_loss(exact, rows, 1)
    rows[1]["targets"]["critic"] = "1"
    with pytest.raises(ValueError, match="row 1: targets of 'solver' cover 1 rounds, round 2 is needed"):
        outer_loss(exact, rows, 2)
    with pytest.raises(ValueError, match="row 1: targets of 'solver' cover 1 rounds, round 2 is needed"):
        inner_loss(exact, "solver", rows, 2)
    with pytest.raises(ValueError, match="sheet"):
        outer_loss(exact, [{"question": "1", "targets": ROWS[0]["targets"]}], 1)
    with pytest.raises(ValueError, match="unknown role 'poet'"):
        warmup_loss(exact, ("poet", "solver"), ROWS)
