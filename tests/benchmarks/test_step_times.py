"""The pieces of a step that the benchmark times are pieces of what it says they are."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import step_times
from benchmarks.step_times import PIECES, measure
from benchmarks.suites.cpu.frozen_cases import TINY, Case
from benchmarks.suites.cpu.frozen_steps import Made, Steps
from recmas_kernels.backends import cpu


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_every_piece_is_passed_and_lies_in_the_decoder():
    made = Made()
    with torch.no_grad():
        steps = Steps(made.of(TINY).agent(torch.float32, True), Case(TINY, torch.float32, "think", 2))
    held = steps.past.length
    found = measure(steps)
    made.close()
    assert found.keys() == {*PIECES, "around it"}
    assert all(microseconds > 0 for microseconds in found.values())
    inner = sum(found[name] for name in PIECES if name != "all of the decoder")
    assert inner < 2 * found["all of the decoder"]  # of medians, taken one by one
    assert steps.past.length > held


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_a_record_says_where_and_of_what_it_is(tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("SHAPES", (TINY,)), ("RUNS", 1), ("STEPS", 2)):
        monkeypatch.setattr(step_times, name, value)
    monkeypatch.setattr(sys, "argv", ["step_times", "--output", str(tmp_path / "record.json")])
    step_times.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert [one["rows"] for one in record["steps"]] == [1, 4, 16]
    assert {"commit", "versions", "threads", "device"} <= record["made"].keys()
    assert record["made"]["device"]["slug"]
