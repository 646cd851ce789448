"""Validation rows, the best links kept, early ends; links that begin elsewhere; what the log says of each link."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recmas.training import InnerConfig, OuterConfig, WarmupConfig, outer_loss, train_inner, train_outer, train_warmup
from recmas.training.link_init import to_identity, to_ridge
from recmas.training.loop import train
from recmas.training.validation import BEST
from recmas_kernels import FusedRecursiveLink
from tests.runtime.training.by_hand import ROWS, STEPS, build, changed, weights
from tests.runtime.training.test_loop import SmallConfig, regression

CONFIG = SmallConfig(steps=12, validate_every=2, checkpoint_every=5)


def run(losses, config=CONFIG, *, output=None, resume=False, on_step=None):
    """A run whose validation is scripted; its module, result, and the parameters as they were after every step."""
    module, loss = regression()
    waiting, after = iter(losses), {}

    def noted(record):
        after[record.step] = [p.detach().clone() for p in module.parameters()]
        return on_step is not None and on_step(record)

    options = {"name": "test", "progress": False, "output": output, "resume": resume, "on_step": noted}
    result = train(dict(module.named_parameters()), loss, config, validate=lambda: next(waiting), **options)
    return module, result, after


def same(module: nn.Module, parameters: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), parameters, strict=True))


@pytest.mark.parametrize("kept", [False, True])
def test_the_best_parameters_are_kept(tmp_path, kept):
    module, result, after = run([5, 3, 1, 2, 4, 6], output=tmp_path if kept else None)
    assert result.steps == 12
    assert [record.validation for record in result.records] == [None, 5, None, 3, None, 1, None, 2, None, 4, None, 6]
    assert result.best is not None
    assert result.best.step == 6
    assert same(module, after[6])


def test_a_run_ends_where_nothing_gets_better(tmp_path):
    config = replace(CONFIG, patience=2)
    module, result, after = run([3, 1, 2, 4], config, output=tmp_path)
    assert result.steps == 8
    assert same(module, after[4])
    again, result, _ = run([], config, output=tmp_path, resume=True)  # it has ended: nothing is trained or measured
    assert result.steps == 8
    assert same(again, after[4])


def test_a_resumed_run_keeps_what_the_whole_one_keeps(tmp_path):
    scripted = [5, 3, 1, 2, 0.5, 6]
    whole, _, _ = run(scripted, output=tmp_path / "whole")
    run(scripted, output=tmp_path / "parts", on_step=lambda record: record.step == 7)
    parts, result, _ = run(scripted[3:], output=tmp_path / "parts", resume=True)
    assert same(whole, list(parts.parameters()))
    assert [record.validation for record in result.records][1::2] == scripted

    def crash(record):
        if record.step == 11:  # the best of step 10 is written, the checkpoint of step 10 is, too
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scripted, replace(CONFIG, checkpoint_every=7), output=tmp_path / "cut", on_step=crash)
    cut, _, _ = run(scripted[3:], replace(CONFIG, checkpoint_every=7), output=tmp_path / "cut", resume=True)
    assert same(whole, list(cut.parameters()))


def test_a_best_file_that_is_not_the_log_s_is_named(tmp_path):
    run([5, 3, 1, 2, 4, 6], output=tmp_path)
    content = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"best.safetensors: cannot be read .* it holds the best links"):
        run([], output=tmp_path, resume=True)
    (tmp_path / BEST).write_bytes(content.replace(b'"step":"6"', b'"step":"4"'))
    with pytest.raises(ValueError, match=r"best.safetensors: does not hold the links of step 6"):
        run([], output=tmp_path, resume=True)


def test_patience_needs_something_to_wait_for():
    with pytest.raises(ValueError, match="patience: there are no validation rows"):
        train_outer(build(), ROWS, OuterConfig(steps=1, patience=3), progress=False)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        InnerConfig(patience=0)


def test_a_loss_that_is_not_finite_names_step_batches_and_checkpoint(tmp_path):
    module, loss = regression()

    def broken(index, step):
        return loss(index, step) * (float("nan") if step == 8 else 1)

    options = {"name": "test", "progress": False, "output": tmp_path}
    with pytest.raises(FloatingPointError, match=r"step 9, batches 16 to 17: loss nan") as info:
        train(dict(module.named_parameters()), broken, SmallConfig(accumulation=2), **options)
    (last,) = tmp_path.glob("checkpoint-00000005-*")
    assert str(info.value).endswith(f"the last good checkpoint is {last}")
    module, loss = regression()
    with pytest.raises(FloatingPointError, match=r"step 9, batch 8: .* there is no checkpoint before it"):
        train(dict(module.named_parameters()), broken, SmallConfig(), name="test", progress=False)


@pytest.mark.parametrize("cached", [False, True])
def test_stages_measure_validation_rows(tmp_path, cached):
    system, others = build(), [ROWS[1]]
    cache = tmp_path / "pairs" if cached else None
    config = InnerConfig(steps=60, batch_size=2, learning_rate=1e-2, warmup_steps=2, validate_every=10, rounds=(1, 2))
    (result,) = train_inner(
        system, ROWS, config, roles=["planner"], validation=others, cache=cache, progress=False
    ).values()
    measured = [record.validation for record in result.records if record.validation is not None]
    assert len(measured) == 6
    assert measured[-1] < 0.7 * measured[0]
    warmup = WarmupConfig(steps=20, batch_size=2, learning_rate=1e-2, warmup_steps=2, validate_every=10)
    edge = ("critic", "solver")
    (result,) = train_warmup(
        system, ROWS, warmup, edges=[edge], validation=others, cache=cache, progress=False
    ).values()
    assert result.best is not None
    outer = OuterConfig(steps=4, batch_size=2, rounds=(1, 2), latent_steps=STEPS, validate_every=2)
    result = train_outer(system, ROWS, outer, validation=others, progress=False)
    assert [record.validation is not None for record in result.records] == [False, True, False, True]
    with pytest.raises(ValueError, match="validation: expected a JSONL path or a sequence of rows, got a callable"):
        train_inner(system, ROWS, config, validation=lambda index: ROWS, progress=False)
    with pytest.raises(ValueError, match="row 0: no field 'sheet', which agent 'planner' reads"):
        train_inner(system, ROWS, config, validation=[{"question": "1", "targets": {}}], progress=False)


def test_the_outer_stage_measures_its_loss_batch_by_batch_whatever_the_micro_batches():
    system, settings = build(), {"latent_steps": STEPS, "round_weights": (0.2, 0.5, 1.0), "distill": 0.5}
    config = OuterConfig(steps=1, batch_size=2, rounds=(2, 3), micro_batch=1, recompute=True, **settings)
    batches = [[ROWS[0], ROWS[1]], [ROWS[1]]]
    result = train_outer(system, ROWS, config, validation=[row for rows in batches for row in rows], progress=False)
    with torch.no_grad():
        means = [outer_loss(system, rows, rounds, **settings) * len(rows) for rows in batches for rounds in (2, 3)]
    assert result.records[0].validation == pytest.approx(sum(means).item() / 6, rel=1e-5)


def test_the_log_names_the_gradient_norm_of_each_link(tmp_path):
    config = OuterConfig(steps=2, batch_size=2, rounds=2, latent_steps=STEPS)
    train_outer(build(), ROWS, config, output=tmp_path, progress=False)
    for line in (tmp_path / "outer" / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        norms = record["grad_norms"]
        assert set(norms) == {"planner->critic", "critic->solver", "solver->planner"}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert total == pytest.approx(record["grad_norm"], rel=1e-5)


# ---- links that begin elsewhere


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", ["inner", "outer"])
def test_identity_is_the_residual_alone(make, norm):
    torch.manual_seed(0)
    inner = make == "inner"
    link = FusedRecursiveLink.inner(6, norm=norm) if inner else FusedRecursiveLink.outer(6, 4, norm=norm)
    to_identity(link)
    x = torch.randn(5, 6)
    kept = x if inner else x[:, :4]
    expected = F.layer_norm(kept, kept.shape[-1:]) if norm else kept
    torch.testing.assert_close(link(x), expected)
    with pytest.raises(ValueError, match="'identity' needs links with a residual"):
        to_identity(FusedRecursiveLink.inner(6, residual="none"))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", ["inner", "outer"])
def test_ridge_finds_a_linear_map(make, norm):
    """An outer link maps exactly what a matrix maps; an inner one, on enough hidden features, comes close."""
    torch.manual_seed(0)
    inner = make == "inner"
    link = FusedRecursiveLink.inner(6, 300, norm=norm) if inner else FusedRecursiveLink.outer(6, 5, norm=norm)
    x = F.layer_norm(torch.randn(4000, 6), (6,))
    target = x @ torch.randn(6, 6 if inner else 5)
    reachable = F.layer_norm(target, target.shape[-1:]) if norm else target
    before = 1 - torch.cosine_similarity(link(x), reachable).mean()
    to_ridge(link, iter([(x[:2000], target[:2000]), (x[2000:], target[2000:])]))
    after = 1 - torch.cosine_similarity(link(x), reachable).mean()
    assert after < (0.05 if inner else 1e-4) * before


@pytest.mark.parametrize("link_init", ["identity", "ridge"])
def test_stages_begin_where_they_are_told(link_init, tmp_path):
    for cache in (None, tmp_path):
        plain, begun = build(), build()
        config = InnerConfig(steps=4, batch_size=2, rounds=(1, 2))
        results = [
            train_inner(system, ROWS, one, progress=False, cache=cache)
            for system, one in ((plain, config), (begun, replace(config, link_init=link_init)))
        ]
        if link_init == "ridge":
            for role, result in results[0].items():
                assert results[1][role].records[0].loss < 0.5 * result.records[0].loss
        warmup = WarmupConfig(steps=4, batch_size=2, link_init=link_init)
        train_warmup(begun, ROWS, warmup, progress=False, cache=cache)
    with pytest.raises(ValueError, match="link_init must be 'default', 'identity' or 'ridge', got 'orthogonal'"):
        InnerConfig(link_init="orthogonal")


def test_a_resumed_run_does_not_begin_again(tmp_path):
    config = InnerConfig(steps=6, batch_size=2, link_init="ridge", checkpoint_every=2)
    whole, parts = build(), build()
    train_inner(whole, ROWS, config, output=tmp_path / "whole", progress=False)
    train_inner(parts, ROWS, config, output=tmp_path / "parts", progress=False, on_step=lambda r: r.step == 3)
    parts = build()
    train_inner(parts, ROWS, config, output=tmp_path / "parts", progress=False, resume=True)
    assert changed(weights(whole), weights(parts)) == set()
