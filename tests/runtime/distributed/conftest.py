"""One Ray cluster for all tests here, and processes that load one agent after another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recmas import Pattern, RecursiveMAS
from recmas.config.system_json import PlacementSpec
from tests.runtime.scheduling.rows import tiny_system

ONE_THREAD = PlacementSpec(threads=1)


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """A cluster of this machine, until the last test here: it takes time and memory even when it has nothing to do."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from recmas.distributed.cluster import cluster

    with cluster():
        yield
    assert not ray.is_initialized()


class Pool:
    """Starting a process takes seconds: those here load one agent after another."""

    def __init__(self) -> None:
        self.free: list[Any] = []
        self.dead: list[Any] = []
        self.taken = 0
        self._all: list[Any] = []
        self._lock = threading.Lock()

    @property
    def lent(self) -> int:
        """Processes that have not come back."""
        return len(self._all) - len(self.free) - len(self.dead)

    def launch(self, start: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self.taken += 1
            if self.free:
                return self.free.pop()
            self._all.append(start(*arguments))
            return self._all[-1]

    def give_back(self, process: Any) -> None:
        with self._lock:
            if process not in self.free + self.dead:
                self.free.append(process)

    def kill(self, process: Any) -> None:
        import ray

        self.dead.append(process)
        ray.kill(process)


@pytest.fixture(scope="package")
def _pool(ray_cluster: None) -> Pool:
    return Pool()


@pytest.fixture
def pooled(_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Processes of agents come from a pool, and go back to it when they would end."""
    from recmas.distributed import executor, replica

    start = executor.launch_process
    monkeypatch.setattr(executor, "launch_process", lambda *arguments: _pool.launch(start, *arguments))

    monkeypatch.setattr(replica, "end_process", _pool.give_back)
    return _pool


def saved(folder: Path, pattern: Pattern, placement: PlacementSpec = ONE_THREAD) -> RecursiveMAS:
    """A tiny system, in `folder` too."""
    system = tiny_system(pattern)
    for setting in system.settings.values():
        setting.placement = placement
    system.save_pretrained(folder)
    return RecursiveMAS.from_pretrained(folder)
