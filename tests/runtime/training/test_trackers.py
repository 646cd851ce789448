"""Trackers get every step's record, and those that cannot be used are told before a run begins."""

from __future__ import annotations

import json

import accelerate.tracking
import pytest

from recmas.cli import main
from recmas.training import InnerConfig, OuterConfig, train_inner, train_outer
from tests.runtime.lean import lean_rows, lean_system, write_lean


class Fake(accelerate.tracking.GeneralTracker):
    """Keeps what it is given."""

    name, requires_logging_directory, made = "fake", False, []

    def __init__(self, run_name):
        super().__init__(_blank=True)
        self.calls = [run_name]
        self.made.append(self)

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["fake"])
    Fake.made = []
    return Fake


def test_each_run_gets_its_records_and_an_end(fake):
    config = OuterConfig(steps=2, batch_size=2, rounds=(1, 2), round_norms=True)
    result = train_outer(lean_system(), lean_rows(), config, trackers=["fake"], progress=False)
    (tracker,) = fake.made
    name, start, settings, first, second, end = tracker.calls
    assert (name, start, end) == ("outer", "start", "finish")
    assert settings["rounds"] == "[1, 2]"
    assert settings["steps"] == 2
    for (step, values), record in zip((first, second), result.records, strict=True):
        assert step == record.step
        assert values["loss"] == record.loss
        assert values["tokens"] == record.tokens > 0
        assert values["grad_norms/planner->critic"] == record.grad_norms["planner->critic"]
        assert [values[f"round_norms/planner->critic/{r}"] for r in (1, 2)] == record.round_norms["planner->critic"]


def test_a_run_that_fails_ends_its_tracker(fake):
    def fails(record):
        raise OSError("disk full")

    config = InnerConfig(steps=2, batch_size=2)
    with pytest.raises(OSError, match="disk full"):
        train_inner(lean_system(), lean_rows(), config, trackers=["fake"], progress=False, on_step=fails)
    assert [tracker.calls[-1] for tracker in fake.made] == ["finish"]


@pytest.mark.parametrize("fails", ["start", "store_init_configuration"])
def test_a_tracker_that_does_not_begin_ends_those_before_it(fake, monkeypatch, fails):
    class Fails(Fake):
        def start(self):
            if fails == "start":
                raise OSError("no network")
            super().start()

        def store_init_configuration(self, values):
            raise OSError("no network")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fails", Fails)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["fake", "fails"])
    config = InnerConfig(steps=1, batch_size=2)
    with pytest.raises(OSError, match="no network"):
        train_inner(lean_system(), lean_rows(), config, trackers=["fake", "fails"], progress=False)
    began, failed = fake.made
    assert began.calls[-1] == "finish"
    assert failed.calls[1:] == ([] if fails == "start" else ["start", "finish"])


def test_trackers_that_cannot_be_used_are_told(fake, monkeypatch):
    arguments = (lean_system(), lean_rows(), InnerConfig(steps=1))
    for name, message in (
        ("abacus", "tracker: 'abacus' is not one of aim, "),
        ("wandb", "tracker: 'wandb' is not installed"),
    ):
        with pytest.raises(ValueError, match=message):
            train_inner(*arguments, trackers=[name], progress=False)
    monkeypatch.setattr(fake, "requires_logging_directory", True)
    with pytest.raises(ValueError, match="tracker: 'fake' writes files, so the training needs an output folder"):
        train_inner(*arguments, trackers=["fake"], progress=False)


def test_tensorboard_has_the_curve_of_the_log(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(write_lean(tmp_path))
    words = ["train", "inner", "system", "--data", "rows.jsonl", "--steps", "3", "--batch-size", "2"]
    assert main([*words, "--roles", "critic", "--tracker", "tensorboard"]) == 0
    curve = EventAccumulator(str(tmp_path / "system" / "training" / "tracked" / "inner-critic")).Reload()
    log = (tmp_path / "system" / "training" / "inner-critic" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert [(one.step, one.value) for one in curve.Scalars("loss")] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses, start=1)
    ]
