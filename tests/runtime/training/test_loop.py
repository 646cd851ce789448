"""The step loop, its data and its checkpoints, on a small regression that needs no agents."""

import json
import math
import re
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from recmas.devices.failure import DeviceError
from recmas.prompts.jsonl import read_rows
from recmas.training.checkpoint import checkpoints, load
from recmas.training.config import AlignmentConfig, LoopConfig, OuterConfig
from recmas.training.data import DataSource, pick, target_texts
from recmas.training.loop import train
from recmas.training.progress import Meter
from recmas.training.step_log import LOG


@dataclass(frozen=True, kw_only=True)
class SmallConfig(LoopConfig):
    steps: int = 12
    batch_size: int = 4
    learning_rate: float = 1e-2
    warmup_steps: int = 3
    checkpoint_every: int = 5


def regression():
    """A module and its loss, a pure function of (index, step)."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))

    def loss(index: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + index)
        x = torch.randn(4, 5, generator=generator)
        return (module(x) - x[:, :2]).square().mean()

    return module, loss


def run(config, *, output=None, resume=False, on_step=None):
    module, loss = regression()
    options = {"name": "test", "progress": False, "output": output, "resume": resume, "on_step": on_step}
    return module, train(dict(module.named_parameters()), loss, config, **options)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    config = SmallConfig(accumulation=2, weight_decay=0.1)
    whole, result = run(config, output=tmp_path / "whole")

    def crash(record):
        if record.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, output=tmp_path / "parts", on_step=crash)
    with open(tmp_path / "parts" / LOG, "a") as file:
        file.write('{"step": 9, "lo')
    parts, second = run(config, output=tmp_path / "parts", resume=True)

    assert second.steps == result.steps == 12
    assert [record.step for record in second.records] == list(range(1, 13))
    assert second.loss == result.loss
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [[json.loads(line) for line in (tmp_path / name / LOG).open()] for name in ("whole", "parts")]
    assert [line["step"] for line in logs[1]] == list(range(1, 13))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]


def test_a_finished_run_resumes_to_its_result_without_a_step(tmp_path):
    trained, done = run(SmallConfig(), output=tmp_path)
    again, result = run(SmallConfig(), output=tmp_path, resume=True)
    assert result.records == done.records
    assert result.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_accumulated_batches_give_the_mean_gradient():
    module, loss = regression()
    (sum(loss(index, 0) for index in range(3)) / 3).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item()
    _, result = run(SmallConfig(steps=1, accumulation=3))
    assert result.records[0].grad_norm == pytest.approx(expected, rel=1e-5)


def test_the_loop_is_adamw_with_clipping_and_decay_on_matrices_only():
    config = SmallConfig(steps=3, weight_decay=0.3, clip_norm=0.05, learning_rate=0.1)
    trained, _ = run(config)
    module, loss = regression()
    first = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for step in range(3):
        module.zero_grad()
        loss(step, step).backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in module.parameters()))
        scale = min(1.0, config.clip_norm / (norm.item() + 1e-6))
        rate = config.rate(step)
        with torch.no_grad():
            for name, p in module.named_parameters():
                gradient = p.grad * scale
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                if p.ndim > 1:
                    p -= rate * 0.3 * p
                mean = first[name] / (1 - 0.9 ** (step + 1))
                p -= rate * mean / ((second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    for a, b in zip(trained.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False, "always"])
def test_the_bar_shows_on_terminals_or_where_it_is_asked_for(monkeypatch, capsys, terminal, progress):
    module, loss = regression()
    meter = Meter()

    def counted(index, step):
        meter.add(torch.tensor(7))
        return loss(index, step)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    result = train(dict(module.named_parameters()), counted, SmallConfig(), name="test", progress=progress, meter=meter)
    err = capsys.readouterr().err
    assert ("test:" in err) == (progress == "always" or (progress and terminal))
    if err:
        assert re.search(rf"loss={result.records[-1].loss:.4f}, grad=.*, tokens/s=[\d,]+, memory=[\d.]+ [MG]iB\]", err)
    assert [record.tokens for record in result.records] == [7 * SmallConfig().accumulation] * result.steps


def test_schedules():
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        config = SmallConfig(steps=103, warmup_steps=3, learning_rate=1.0, schedule=schedule)
        assert [config.rate(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
        assert config.rate(53) == pytest.approx(middle)
    assert SmallConfig(steps=100, schedule="linear").rate(99) > 0


def test_early_stop_keeps_a_checkpoint(tmp_path):
    module, result = run(SmallConfig(), output=tmp_path, on_step=lambda record: record.step == 7)
    assert result.steps == 7
    stored = load(tmp_path)
    assert stored.step == 7
    assert torch.equal(stored.tensors["parameter.0.weight"], module[0].weight)


def test_a_run_that_failed_before_its_first_step_leaves_the_folder_free(tmp_path):
    module, _ = regression()

    def fail(index: int, step: int) -> torch.Tensor:
        raise ValueError("row 0: no target")

    with pytest.raises(ValueError, match="row 0: no target"):
        train(dict(module.named_parameters()), fail, SmallConfig(), name="test", output=tmp_path, progress=False)
    _, result = run(SmallConfig(), output=tmp_path)
    assert [record.step for record in result.records] == list(range(1, 13))


def test_a_run_without_a_checkpoint_is_still_a_run(tmp_path):
    def crash(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SmallConfig(), output=tmp_path, on_step=crash)
    assert checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match=r"already holds a training run.*--resume.*--output"):
        run(SmallConfig(), output=tmp_path)


def test_a_folder_is_never_overwritten_or_mixed(tmp_path):
    run(SmallConfig(), output=tmp_path)
    with pytest.raises(ValueError, match="already holds a training run"):
        run(SmallConfig(), output=tmp_path)
    with pytest.raises(ValueError, match="learning_rate = 0.01, this run has 0.02"):
        run(replace(SmallConfig(), learning_rate=0.02), output=tmp_path, resume=True)
    log = (tmp_path / LOG).read_text()
    (tmp_path / LOG).write_text("{}\n" + log)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: not a record of a training step"):
        run(SmallConfig(), output=tmp_path, resume=True)
    (tmp_path / LOG).write_text(log.partition("\n")[2])
    with pytest.raises(ValueError, match=r"log\.jsonl: lacks steps that checkpoint-00000012"):
        run(SmallConfig(), output=tmp_path, resume=True)


def test_a_device_that_fails_is_named_and_the_steps_before_stay(tmp_path):
    def lost(record):
        if record.step == 6:
            raise torch.AcceleratorError("CUDA error: unknown error\nadvice")

    with pytest.raises(DeviceError, match="^training links on cpu: CUDA error: unknown error$"):
        run(SmallConfig(), output=tmp_path, on_step=lost)
    assert (tmp_path / LOG).read_text().count("\n") == 6
    assert load(tmp_path).step == 5


def test_a_loss_that_is_not_finite_stops_before_the_parameters_are_touched():
    module, loss = regression()
    parameters = dict(module.named_parameters())
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(FloatingPointError, match="step 1, batch 0: loss nan"):
        train(parameters, lambda i, s: loss(i, s) * math.nan, SmallConfig(), name="test", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_trained_parameters_must_be_masters_that_require_grad():
    options = {"config": SmallConfig(), "name": "test", "progress": False}
    with pytest.raises(ValueError, match=r"0\.weight: trained parameters must be float32 masters"):
        train(dict(regression()[0].bfloat16().named_parameters()), lambda i, s: torch.zeros(()), **options)
    with pytest.raises(ValueError, match="must require grad"):
        train(dict(regression()[0].requires_grad_(False).named_parameters()), lambda i, s: torch.zeros(()), **options)
    with pytest.raises(ValueError, match="there are none to train"):
        train({}, lambda i, s: torch.zeros(()), **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("accumulation", 0), ("learning_rate", 0.0), ("clip_norm", -1.0),
     ("schedule", "steep"), ("warmup_steps", -1), ("checkpoint_every", -1), ("learning_rate", float("inf")),
     ("learning_rate", 1e300), ("weight_decay", -1.0), ("weight_decay", float("nan")), ("betas", (1.5, 0.9)),
     ("betas", (0.9, float("nan"))), ("betas", (0.9,)), ("clip_norm", float("nan"))],
)  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        SmallConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("betas", 0.9), ("betas", "ab"), ("learning_rate", "1"), ("weight_decay", "1"), ("clip_norm", None),
     ("cosine_weight", "1"), ("mse_weight", None), ("distill", "1"), ("rounds", 1.5), ("round_weights", 1.0),
     ("round_weights", ("1", "1", "1"))],
)  # fmt: skip
def test_settings_of_other_types_are_named(field, value):
    kind = AlignmentConfig if field in ("cosine_weight", "mse_weight") else OuterConfig
    with pytest.raises(ValueError, match=f"^{field} must be .*got {re.escape(repr(value))}$"):
        kind(**{field: value})


def test_batches_are_a_pure_function_of_seed_and_index():
    rows = [{"n": n} for n in range(10)]
    source = DataSource(rows, batch_size=4, seed=3)
    forward = [source.batch(index) for index in range(5)]
    assert [source.batch(index) for index in reversed(range(5))] == forward[::-1]
    flat = [row["n"] for batch in forward for row in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert DataSource(rows, batch_size=4, seed=4).batch(0) != forward[0]


def test_rows_come_from_a_file_a_sequence_or_a_callable(tmp_path):
    rows = [{"n": n} for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_rows(path) == rows
    assert DataSource(path, 2, 0).batch(7) == DataSource(rows, 2, 0).batch(7) == DataSource(str(path), 2, 0).batch(7)
    assert DataSource(lambda index: [{"n": index}], 2, 0).batch(7) == [{"n": 7}]
    with pytest.raises(ValueError, match="no rows for batch 7"):
        DataSource(lambda index: [], 2, 0).batch(7)


def test_broken_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not valid JSON"):
        read_rows(path)
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: expected a JSON object, got list"):
        read_rows(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_rows(path)
    with pytest.raises(ValueError, match="empty sequence"):
        DataSource([], 2, 0)


def test_targets_are_one_text_or_one_per_round():
    rows = [{"targets": {"a": "same", "b": ["one", "two"]}}]
    assert [target_texts(rows, "a", t) for t in (1, 2, 3)] == [["same"]] * 3
    assert [target_texts(rows, "b", t) for t in (1, 2)] == [["one"], ["two"]]
    with pytest.raises(ValueError, match="row 0: targets of 'b' cover 2 rounds, round 3 is needed"):
        target_texts(rows, "b", 3)
    with pytest.raises(ValueError, match=r"row 0: targets has no text for agent 'c', only for \['a', 'b'\]"):
        target_texts(rows, "c", 1)
    with pytest.raises(ValueError, match="row 1: expected 'targets'"):
        target_texts([*rows, {"question": "?"}], "a", 1)
    with pytest.raises(ValueError, match="row 0: expected the target of agent 'a' to be text, got 3"):
        target_texts([{"targets": {"a": 3}}], "a", 1)


def test_pick_depends_on_seed_and_step_only():
    drawn = [pick(5, step, (1, 2, 3)) for step in range(60)]
    assert set(drawn) == {1, 2, 3}
    assert drawn == [pick(5, step, (1, 2, 3)) for step in range(60)]
    assert drawn != [pick(6, step, (1, 2, 3)) for step in range(60)]
    assert pick(5, 9, 2) == 2
