"""How many cores a process may use, by made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recmas.distributed.cores import cores


@pytest.fixture(autouse=True)
def scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may run on eight cores."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)


def groups(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


V2 = {"proc/self/cgroup": "0::/a/b"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/m"}
PERIOD = {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "200000 100000"}, 2),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 2),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "1000 100000"}, 1),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "1600000 100000"}, 8),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({**V1, **PERIOD, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000"}, 3),
        ({**V1, **PERIOD, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1"}, 8),
        ({**V1, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000"}, 8),
        ({**V1, "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "100000"}, 8),
    ],
)
def test_a_quota_counts_as_the_cores_that_it_keeps_busy(tmp_path: Path, files: dict[str, str], expected: int):
    assert cores(groups(tmp_path, files)) == expected


def test_older_pythons_ask_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path) == 1
