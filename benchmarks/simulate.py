"""What a cluster of so many devices would answer per second: a small simulation of the pipeline, not a measurement.

    python -m benchmarks.simulate                          # the table of docs/scale.md, 1, 8 and 64 devices
    python -m benchmarks.simulate --devices 16 --batch 128 --latent-steps 64 --handoff-gbps 2

Micro-batches go through the visits of a run; an agent's replicas take them first come, first served, a message needs
its bytes over the rate between devices, and every call a constant. An agent reads a prompt at a rate of its own, then
takes single positions, each of which reads the weights once for the whole batch.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recmas.config.pattern import SEQUENTIAL, Pattern, Visit


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        pattern: of the system; every agent has as many replicas as its share of the devices.
        rounds: of the run.
        devices: in all.
        batch: rows of a micro-batch.
        micro_batches: that are answered.
        prompt: positions of a prompt, slots left out.
        latent_steps: of a message.
        answer: tokens of an answer.
        features: of a latent; `bytes_each` per number.
        bytes_each: of a number of a latent.
        prefill: positions that a device reads per second.
        step: seconds of a single position, whatever the batch, up to `rows_free` rows; beyond these it grows with them.
        rows_free: rows that a step takes along for nothing.
        handoff: bytes per second between two devices.
        call: seconds of a call of another process, at both ends.
    """

    pattern: Pattern = SEQUENTIAL
    rounds: int = 3
    devices: int = 8
    batch: int = 64
    micro_batches: int = 64
    prompt: int = 300
    latent_steps: int = 32
    answer: int = 256
    features: int = 4096
    bytes_each: int = 2
    prefill: float = 40_000.0
    step: float = 0.012
    rows_free: int = 64
    handoff: float = 10e9
    call: float = 0.003

    @property
    def handoff_bytes(self) -> int:
        """Of one message of one micro-batch."""
        return self.batch * self.latent_steps * self.features * self.bytes_each

    def seconds(self, visit: Visit) -> float:
        """Of a device, for one visit of one micro-batch."""
        positions = self.prompt + self.latent_steps * len(visit.senders)
        steps = self.answer if visit.final else max(self.latent_steps - 1, 0)
        return self.batch * positions / self.prefill + steps * self.step * max(1.0, self.batch / self.rows_free)

    def waiting(self, visit: Visit) -> float:
        """Seconds until the messages of a visit are there, and the call is."""
        return self.call + len(visit.senders) * self.handoff_bytes / self.handoff


@dataclass(frozen=True)
class Forecast:
    """What came out.

    Attributes:
        rows_per_second: over the whole run.
        latency: seconds of a micro-batch from its first visit to its end, on average.
        busy: share of the time that an agent's devices compute, by role.
        bandwidth: bytes per second that all handoffs together need.
    """

    rows_per_second: float
    latency: float
    busy: dict[str, float]
    bandwidth: float

    @property
    def bottleneck(self) -> str:
        """The agent that is never idle."""
        return max(self.busy, key=lambda role: self.busy[role])


def replicas(cluster: Cluster) -> dict[str, float]:
    """Devices of every agent: shared in proportion to the work, whole ones where there are at least as many as agents.

    With fewer devices than agents, agents share them: each has a part of one.
    """
    work = dict.fromkeys(cluster.pattern.roles, 0.0)
    for visit in cluster.pattern.visits(cluster.rounds):
        work[visit.role] += cluster.seconds(visit)
    if cluster.devices < len(work):
        return {role: cluster.devices * seconds / sum(work.values()) for role, seconds in work.items()}
    shares = dict.fromkeys(work, 1)
    for _ in range(cluster.devices - len(work)):
        slowest = max(work, key=lambda role: work[role] / shares[role])
        shares[slowest] += 1
    return {role: float(count) for role, count in shares.items()}


def simulate(cluster: Cluster) -> Forecast:
    """Send the micro-batches through; those that are under way are twice the devices."""
    share = replicas(cluster)
    lanes = {role: [0.0] * max(1, int(count)) for role, count in share.items()}
    slow = {role: 1.0 / min(1.0, count) for role, count in share.items()}
    visits = list(cluster.pattern.visits(cluster.rounds))
    ended: list[dict[tuple[str, int], float]] = [{} for _ in range(cluster.micro_batches)]
    busy = dict.fromkeys(share, 0.0)
    begun, over = [0.0] * cluster.micro_batches, [0.0] * cluster.micro_batches
    room = 2 * max(cluster.devices, len(share))
    events = [(0.0, number, 0) for number in range(min(room, cluster.micro_batches))]
    heapq.heapify(events)
    coming = len(events)
    while events:
        ready, number, place = heapq.heappop(events)
        visit = visits[place]
        lane = lanes[visit.role]
        device = min(range(len(lane)), key=lane.__getitem__)
        start = max(ready, lane[device])
        seconds = cluster.seconds(visit) * slow[visit.role]
        lane[device] = start + seconds
        busy[visit.role] += seconds / len(lane)
        ended[number][visit.role, visit.round] = start + seconds
        if place == 0:
            begun[number] = start
        if visit.final:
            over[number] = start + seconds
            if coming < cluster.micro_batches:
                heapq.heappush(events, (over[number], coming, 0))
                coming += 1
            continue
        following = visits[place + 1]
        sources = zip(following.senders, following.sender_rounds, strict=True)
        there = max((ended[number][source] for source in sources), default=ready)
        heapq.heappush(events, (there + cluster.waiting(following), number, place + 1))
    total = max(over)
    sent = sum(len(visit.senders) for visit in visits) * cluster.handoff_bytes * cluster.micro_batches
    return Forecast(
        cluster.batch * cluster.micro_batches / total,
        sum(over) / len(over) - sum(begun) / len(begun),
        {role: seconds / total for role, seconds in busy.items()},
        sent / total,
    )


def table(clusters: Sequence[Cluster]) -> str:
    """A row per cluster."""
    lines = [
        "| devices | rows per micro-batch | bytes per handoff | rows/s | seconds of a micro-batch | all handoffs "
        "| waits for |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cluster in clusters:
        found = simulate(cluster)
        lines.append(
            f"| {cluster.devices} | {cluster.batch} | {cluster.handoff_bytes / 1e6:.1f} MB "
            f"| {found.rows_per_second:.1f} "
            f"| {found.latency:.1f} | {found.bandwidth / 1e6:.0f} MB/s "
            f"| {found.bottleneck}, busy {100 * found.busy[found.bottleneck]:.0f}% |"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--latent-steps", type=int, default=Cluster.latent_steps)
    parser.add_argument("--handoff-gbps", type=float, default=Cluster.handoff / 1e9, help="gigabytes per second")
    asked = parser.parse_args(words)
    base = replace(Cluster(), latent_steps=asked.latent_steps, handoff=asked.handoff_gbps * 1e9)
    clusters = [
        replace(base, devices=devices, batch=batch, micro_batches=max(64, 4 * devices))
        for batch in asked.batch
        for devices in asked.devices
    ]
    print(table(clusters))


if __name__ == "__main__":
    main()
