"""`RayExecutor`: runs tasks on agents in processes of a Ray cluster; the walk is that of the local executor."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from recmas.config.system_json import PlacementSpec, SystemSpec
from recmas.distributed.agent_process import AgentProcess
from recmas.distributed.cluster import Reserved
from recmas.distributed.order import Described, Loading, Order
from recmas.distributed.replica import CONTROL, WATCH, Job, Replica, Sent
from recmas.distributed.sealed import RefusedError, Stamp
from recmas.distributed.turns import Turns
from recmas.prompts.rows import Fields
from recmas.scheduling.admission import Admission, Room
from recmas.scheduling.executor import Lane, Report
from recmas.scheduling.gather import Place
from recmas.scheduling.task import Piece, Task
from recmas.system.fingerprint import joint_digest
from recmas.system.member import Prompts
from recmas.system.widths import check_widths


class RayExecutor:
    """Agents in processes of a cluster that this process is part of (`recmas.distributed.cluster`).

    A process that ends is started again; its batch is repeated from the messages, which lie in the cluster, or, where
    these are gone, too, from the beginning of the walk. Latents go from process to process, not through this one.

    Args:
        spec: of the system; says where agents run.
        loading: how they are loaded.
        pace: seconds between two reports of an answer that grows; None reports it at its end.
        ahead: tasks that wait at a process while it works, so that it is never idle; the rows of these do not wait for
            others to share their batch.

    Attributes:
        digest: of the system (`recmas.system.fingerprint`).
        refused: handoffs that were not what they should have been.

    Raises:
        ValueError: a placement that the cluster does not satisfy, an agent that cannot be loaded, or a link that does
            not fit.
    """

    def __init__(self, spec: SystemSpec, loading: Loading, *, pace: float | None = None, ahead: int = 0) -> None:
        self.refused, self._ahead = 0, ahead
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._replicas: dict[str, list[Replica]] = {}
        self._turns = Turns(self._replicas, ahead)
        placements = {role: agent.placement for role, agent in spec.agents.items()}
        self._reserved = Reserved(placements)
        key = secrets.token_bytes(32)
        try:
            self._reserved.take()
            for role, placement in placements.items():
                self._replicas[role] = []
                for number in range(placement.replicas):
                    launch = partial(launch_process, placement, self._strategy(role, number), loading.backend)
                    device = "cuda" if placement.gpus else "cpu"
                    replica = Replica(role, launch, (loading, spec, role, device, key), pace, self._refuse)
                    self._replicas[role].append(replica)
                    replica.load()  # once it is known here: a signal may end it at any moment
            self.described = {role: self._loaded(role) for role in spec.pattern.roles}
            check_widths(
                {role: one.width for role, one in self.described.items()},
                {role: one.inner for role, one in self.described.items() if one.inner is not None},
                {key: maps for one in self.described.values() for key, maps in one.outer.items()},
            )
        except BaseException:
            self.close()
            raise
        digests = {role: one.digest for role, one in self.described.items()}
        self.digest = joint_digest(spec.pattern, spec.defaults, digests)
        self._admissions = {
            role: Admission(Prompts(role, spec.agents[role], one.tokenizer, one.vocabulary), one.context)
            for role, one in self.described.items()
        }

    @property
    def lanes(self) -> Mapping[str, Lane]:
        return {role: Lane(role, len(replicas) * (1 + self._ahead)) for role, replicas in self._replicas.items()}

    @property
    def restarts(self) -> int:
        """Processes that were started in the place of others."""
        return sum(replica.restarts for replica in self._all)

    @property
    def repeated(self) -> int:
        """Batches that were lost, or had messages that were lost or refused."""
        return sum(replica.lost for replica in self._all)

    @property
    def faults(self) -> Mapping[str, int]:
        return {
            "handoffs refused": self.refused,
            "agents restarted": self.restarts,
            "batches repeated": self.repeated,
        }

    @property
    def ready(self) -> bool:
        return all(any(one.open for one in replicas) for replicas in self._replicas.values())

    @property
    def broken(self) -> Exception | None:
        for replicas in self._replicas.values():
            if all(one.broken is not None for one in replicas):
                return replicas[0].broken
        return None

    def start(self, task: Task, report: Report) -> None:
        stamps: list[Stamp] = []
        messages: list[Any] = []
        reads: dict[str, list[Place]] = {}
        for sender, pieces in task.messages.items():
            mine: list[Sent] = []
            reads[sender] = [None if piece is None else _place(piece, mine) for piece in pieces]
            stamps += [sent.stamp for sent in mine]
            messages += [sent.ref for sent in mine]
        role, work = task.work.role, task.work
        link = self.described[role].link if work.latent_steps is not None else ""
        number = next(self._numbers)  # those of tasks begin anew with every dispatcher
        order = Order(Task(number, work, task.parts, {}), Stamp(self.digest, link, role, number), stamps, reads)
        self._turns.add(Job(task, order, tuple(messages), report))

    def rooms(self, rounds: int, row: Fields, index: int = 0) -> Mapping[str, Room]:
        return {role: admission.room(rounds, row, index) for role, admission in self._admissions.items()}

    def close(self) -> None:
        self._turns.close()
        for replica in self._all:
            replica.close()
        self._reserved.free()

    @property
    def _all(self) -> list[Replica]:
        return [replica for replicas in self._replicas.values() for replica in replicas]

    def _strategy(self, role: str, number: int) -> Any:
        bundles = self._reserved.bundles[role]
        if not bundles:
            return "DEFAULT"
        return PlacementGroupSchedulingStrategy(self._reserved.group, placement_group_bundle_index=bundles[number])

    def _loaded(self, role: str) -> Described:
        found = [replica.begin() for replica in self._replicas[role]]
        if len({one.digest for one in found}) > 1:
            raise ValueError(f"agent {role!r}: its replicas have not loaded the same files")
        return found[0]

    def _refuse(self, error: RefusedError) -> None:
        with self._lock:
            self.refused += 1


def launch_process(placement: PlacementSpec, strategy: Any, backend: str | None) -> Any:
    """A process for an agent; Ray's handle of it."""
    threads = placement.threads or placement.cpus or torch.get_num_threads()
    variables = {
        "OMP_NUM_THREADS": str(threads),  # Ray would say 1
        # What a visit frees the next one takes again; by default the C library gives it back, page by page.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }
    if backend is not None or "RECMAS_BACKEND" in os.environ:
        variables["RECMAS_BACKEND"] = backend or os.environ["RECMAS_BACKEND"]
    asked = placement.asked
    process: Any = ray.remote(concurrency_groups={CONTROL: 1, WATCH: 1})(AgentProcess)
    return process.options(
        num_cpus=asked.pop("CPU", 0),
        num_gpus=asked.pop("GPU", 0),
        resources=asked,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": variables},
        max_restarts=0,
        max_task_retries=0,
    ).remote(threads)


def _place(piece: Piece, sent: list[Sent]) -> tuple[int, int]:
    """Where a row's message is among those that are sent along, which it joins if it is not there yet."""
    known = next((index for index, one in enumerate(sent) if one is piece.batch), len(sent))
    if known == len(sent):
        sent.append(piece.batch)
    return known, piece.row
