"""A Ray cluster: joined, or started on this machine for as long as it is needed; and places for agents in it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from recmas.config.system_json import PlacementSpec

PATIENCE = 30.0
"""Seconds that a cluster has to reserve what agents ask for, once it has that much at all."""
LOOK = 1
"""Seconds between two looks at whether it has; Ray knows whole ones alone."""


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Within, this process is part of a cluster: the one it is part of already, that at `address`, or a new one.

    A new one has this machine alone, and ends with the block. Nothing is reported to anybody, no dashboard runs, no
    process waits for tasks that nobody has (Ray would start one per core), and agents have this process's share of a
    processor: Ray would give them a niceness of 15, and 3% of one beside other work.

    Raises:
        ConnectionError: no cluster answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    begun, over = Future[None](), threading.Event()
    keeper = threading.Thread(target=_keep, args=(address, begun, over), name="recmas cluster")
    try:
        keeper.start()
        begun.result()
        yield
    finally:
        over.set()
        if keeper.is_alive():
            keeper.join()


def _keep(address: str | None, begun: Future[None], over: threading.Event) -> None:
    """Join or start a cluster, and leave it when it is over.

    In a thread of its own: a signal interrupts the main thread alone, and no start of processes halfway; and Ray puts
    no handlers of its own in the place of those that are there.
    """
    import ray

    where: dict[str, Any] = (
        {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    )
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that handlers are missing
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is not None:
            said = " ".join(str(error).split())[:200]
            error = ConnectionError(f"no Ray cluster answers at {address!r}: {said}")
        begun.set_exception(error)
    except BaseException as error:
        begun.set_exception(error)
    else:
        begun.set_result(None)
        over.wait()
    ray.shutdown(wait_for_processes=True)


class Reserved:
    """Places for the processes of agents: all that these ask for, or nothing.

    Args:
        placements: of the agents, by role.

    Attributes:
        group: Ray's placement group, once it is taken; None where nobody asks for anything.
        bundles: of that group, by role, one per replica; empty for a role that asks for nothing.
    """

    def __init__(self, placements: Mapping[str, PlacementSpec]) -> None:
        self._placements = placements
        self._wanted: list[dict[str, float]] = []
        self._name = f"recmas {secrets.token_hex(8)}"
        self.group: Any = None
        self.bundles: dict[str, range] = {}
        for role, placement in placements.items():
            begin = len(self._wanted)
            self._wanted += [placement.asked] * placement.replicas if placement.asked else []
            self.bundles[role] = range(begin, len(self._wanted))

    def take(self) -> None:
        """Reserve the places; what an error or a signal leaves of that, `free` gives back.

        Raises:
            ValueError: the cluster does not have that much, or not free.
        """
        from ray.util import placement_group

        if not self._wanted:
            return
        _check(self._placements)
        self.group = placement_group(self._wanted, strategy="PACK", name=self._name)
        end = time.monotonic() + PATIENCE
        while not self.group.wait(LOOK):  # signals are heeded between two calls
            if time.monotonic() >= end:
                wanted = _words(_total(self._placements))
                raise ValueError(f"placement: the cluster has not had {wanted} free in {PATIENCE:.0f} s")

    def free(self) -> None:
        """Give the places back. They are found by their name: a signal may have come before they had any other."""
        if self._wanted:
            from ray.util import get_placement_group, remove_placement_group

            with contextlib.suppress(ValueError):  # nothing has been reserved
                remove_placement_group(get_placement_group(self._name))


def _check(placements: Mapping[str, PlacementSpec]) -> None:
    """Refuse what can never be placed: Ray would wait for machines that join."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for role, placement in placements.items():
        if not any(all(node.get(name, 0) >= count for name, count in placement.asked.items()) for node in nodes):
            raise ValueError(
                f"placement: no machine of the cluster has {_words(placement.asked)}, which agent {role!r} asks for"
            )
    for name, count in _total(placements).items():
        if (there := sum(node.get(name, 0) for node in nodes)) < count:
            raise ValueError(f"placement: all agents ask for {count:g} {name}, the cluster has {there:g}")


def _total(placements: Mapping[str, PlacementSpec]) -> dict[str, float]:
    total: dict[str, float] = {}
    for placement in placements.values():
        for name, count in placement.asked.items():
            total[name] = total.get(name, 0.0) + placement.replicas * count
    return total


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in resources.items())
