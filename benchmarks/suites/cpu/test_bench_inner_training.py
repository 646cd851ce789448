"""Inner training over a fixed set, each text run through its frozen agent once, against the reference way."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import Setting
from benchmarks.harness.names import FUSED, REFERENCE
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from benchmarks.peers.reference_training import reference_inner
from recmas.training import InnerConfig, train_inner
from recmas_kernels.testing import eager_twin

pytestmark = pytest.mark.runtime

ROLE = "planner"
EPOCHS, ROUNDS = 20, 3
SAME = 0.01  # of the final loss


def cases(full: bool) -> list[Setting]:
    return [Setting(8, 512, 32_000, 60, 32, 32, 2, 16)] if full else [Setting(2, 64, 256, 12, 4, 6, 2, 4)]


def link_work(case: Setting, system, steps: int, batch: int) -> floors.Work:
    return floors.link_training(system.inner_links[ROLE].config, batch * (case.new_tokens + 1), 4) * steps


def test_inner_training(case: Setting, bench: Bench, tmp_path: Path) -> None:
    """All epochs of the set; the pairs are on disk already, as they are after the first one."""
    system, rows = case.training()
    batch = max(1, case.batch // 4)
    config = InnerConfig(steps=EPOCHS * case.batch // batch, batch_size=batch, learning_rate=1e-3)
    begun = copy.deepcopy(system.inner_links[ROLE].state_dict())

    def ours() -> float:
        system.inner_links[ROLE].load_state_dict(begun)
        result = train_inner(system, rows, config, roles=[ROLE], cache=tmp_path, progress=False)[ROLE]
        epoch = result.records[-(case.batch // batch) :]
        return sum(record.loss for record in epoch) / len(epoch)

    def theirs() -> float:
        link = eager_twin(system.inner_links[ROLE], torch.float32)
        link.load_state_dict(begun)
        return reference_inner(system, ROLE, link, rows, config)

    found, expected = ours(), theirs()
    error = abs(found - expected) / expected
    assert error <= SAME, f"final loss {found:.5f}, the reference way {expected:.5f}"
    bench.run(
        Labels("inner", f"inner training, {EPOCHS} epochs", case.shape, torch.float32, "forward+backward", batch),
        {FUSED: ours, REFERENCE: theirs},
        link_work(case, system, config.steps, batch),
        {FUSED: error},
        Goal(10.0, peer=REFERENCE),
        rounds=ROUNDS,
        bound=TimeBound(all_seconds=120),
        twice=None,
    )
