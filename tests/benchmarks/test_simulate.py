"""The simulated pipeline agrees with what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulate import Cluster, replicas, simulate, table
from recmas.config.pattern import MIXTURE, Pattern

# One second per visit of two agents; handoffs and calls take nothing.
PAIR = Cluster(
    pattern=Pattern((("a",), ("b",))),
    rounds=1,
    devices=2,
    batch=1,
    micro_batches=10,
    prompt=0,
    latent_steps=0,
    answer=0,
    call=0.0,
)


class Seconds(Cluster):
    """Every visit takes one second."""

    def seconds(self, visit: object) -> float:
        return 1.0


def of(**changes: object) -> Seconds:
    return Seconds(**{**vars(PAIR), **changes})


def test_a_pipeline_of_two_takes_a_second_per_batch_after_the_first() -> None:
    found = simulate(of())
    assert found.rows_per_second == pytest.approx(10 / 11)
    assert found.busy == pytest.approx({"a": 10 / 11, "b": 10 / 11})


def test_one_device_takes_the_sum_of_all_work() -> None:
    """Two agents share it, each at half its speed."""
    assert simulate(of(devices=1, micro_batches=1000)).rows_per_second == pytest.approx(0.5, rel=0.01)


def test_replicas_go_where_the_work_is() -> None:
    cluster = replace(Cluster(), devices=12)
    assert sum(replicas(cluster).values()) == 12
    assert replicas(cluster)["solver"] == max(replicas(cluster).values())


def test_handoffs_count() -> None:
    cluster = of(latent_steps=4, features=8, bytes_each=2, handoff=64.0)
    assert cluster.handoff_bytes == 64
    assert simulate(replace(cluster, micro_batches=1)).rows_per_second == pytest.approx(1 / 3)
    found = simulate(cluster)
    assert found.bandwidth == pytest.approx(64 * 10 / 12)
    mixed = Seconds(**{**vars(cluster), "pattern": MIXTURE, "devices": 4, "micro_batches": 1})
    visits = list(MIXTURE.visits(1))
    assert mixed.waiting(visits[-1]) == pytest.approx(3.0)


def test_the_table_of_the_page_is_this_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    clusters = [
        replace(Cluster(), devices=devices, batch=batch, micro_batches=max(64, 4 * devices))
        for batch in (16, 64)
        for devices in (1, 8, 64)
    ]
    assert table(clusters) in page
