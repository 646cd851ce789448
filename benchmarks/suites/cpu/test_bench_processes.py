"""Inner training from the cache in two processes of one thread each, against one: rows per second, and the same links.

What is timed are a run's steps, with their lines in the log, by the process that writes it; what comes before them
(reading the rows, opening the cache) is the same however many steps a run has. A step has two batches, one for each of
the two processes; the larger they are, the less its one message costs. Two processes that train a batch per step each,
apart from each other and without any message, show what the machine itself gives to two; nothing beyond that is in
reach of those that train together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness.bench import Bench
from benchmarks.harness.floors import link_training
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import Setting
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels, Samples
from benchmarks.harness.time_bound import TimeBound
from benchmarks.suites.cpu.training_processes import together
from recmas.training import InnerConfig
from recmas_kernels import LinkConfig

pytestmark = pytest.mark.runtime

pytest.importorskip("accelerate", reason="accelerate is not installed")

ALONE = "one process"
APART = "two processes apart"
BATCHES = 2  # of a step
ROUNDS = 5
WARM_UP = 2  # runs that are not timed: the first ones of two processes took a tenth longer
BOUND = TimeBound(all_seconds=60)  # one process takes part in every round


@dataclass(frozen=True)
class Case:
    """So many rows per batch in so many steps; the least speed-up over one process, where one is claimed."""

    setting: Setting
    rows: int
    steps: int
    must: float | None = None

    @property
    def pairs(self) -> int:
        """Of a batch."""
        return self.rows * (self.setting.new_tokens + 1)

    @property
    def id(self) -> str:
        return f"{self.setting.id}-{self.pairs}-pairs"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(Setting(2, 64, 256, 12, 4, 6, 2, 4), 2, 2)]
    texts = {tokens: Setting(2, 512, 32_000, 60, 32, tokens - 1, 2, 32) for tokens in (32, 256)}
    return [Case(texts[256], 32, 8, 1.7), Case(texts[256], InnerConfig().batch_size, 20), Case(texts[32], 8, 100)]


def test_processes(case: Case, bench: Bench, tmp_path: Path) -> None:
    config = InnerConfig(steps=case.steps, batch_size=case.rows, accumulation=BATCHES, learning_rate=1e-3)
    width = case.setting.features
    link = LinkConfig("inner", width, width, width, "identity")
    with (
        together(1, case.setting, config, tmp_path / "one") as one,
        together(2, case.setting, config, tmp_path / "two") as two,
        together(2, case.setting, replace(config, accumulation=1), tmp_path / "apart", joined=False) as apart,
    ):
        for _ in range(WARM_UP):
            assert one.train() == two.train(), "two processes make another link than one"
            apart.train()
        groups = {FUSED: two, ALONE: one, APART: apart}
        for group in groups.values():
            group.seconds.clear()

        def of_steps(samples: Samples) -> Samples:
            return {name: group.seconds[-len(samples[name]) :] for name, group in groups.items()}

        bench.run(
            Labels(
                "processes",
                "inner training in two processes",
                case.setting.shape,
                torch.float32,
                "forward+backward",
                case.pairs,
            ),
            {name: group.train for name, group in groups.items()},
            link_training(link, case.pairs, 4) * (BATCHES * case.steps),
            {FUSED: 0.0},
            None if case.must is None else Goal(case.must, peer=ALONE),
            rounds=ROUNDS,
            bound=BOUND,
            weighed=(),
            twice=None,
            settle=of_steps,
        )
