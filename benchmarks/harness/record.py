"""One measured cell: timed side by side, written down with every column, and held to its goal.

A record is a JSON object: labels (suite, op, shape, dtype, pass, tokens, cache, graph), the work and its floor, one
entry per implementation (times, share of the floor, rates, error, launches, memory, raw samples), the ratios of every
peer to the implementation under test, which is called "fused" throughout, and the peers without times ("unmeasured").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.harness.floors import Work, floor
from benchmarks.harness.footprint import Footprint
from benchmarks.harness.goals import Goal
from benchmarks.harness.machine import Limits
from benchmarks.harness.names import AGAIN, FUSED, PRODUCTS, READS
from benchmarks.harness.time_bound import Unmeasured
from benchmarks.harness.timing import Quantiles, Ratio

SCHEMA = 1
Samples = dict[str, list[float]]  # seconds per call, by variant


@dataclass(frozen=True)
class Labels:
    """What was measured. ``suite`` is the results file, ``mode`` the pass ("forward", "forward+backward", ...).

    ``graph``: the calls ran as one CUDA graph.
    """

    suite: str
    op: str
    shape: str
    dtype: torch.dtype
    mode: str
    tokens: int
    cold: bool = False
    graph: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def make_record(
    labels: Labels,
    cache: str,
    work: Work,
    limits: Limits,
    samples: Mapping[str, Sequence[float]],
    errors: Mapping[str, float],
    footprints: Mapping[str, Footprint],
    goal: Goal | None,
    unmeasured: Mapping[str, Unmeasured] | None = None,
) -> dict[str, Any]:
    """The record of a cell.

    Args:
        labels: what was measured.
        cache: the state of the caches before each call.
        work: of one call.
        limits: the machine's rates.
        samples: seconds per call, by implementation; entry i of each belongs to round i.
        errors: against float64, by implementation.
        footprints: by implementation, where counted.
        goal: the claim; None for none.
        unmeasured: peers without samples, and why.
    """
    stream = limits.memory_stream if cache == "cold" else limits.stream(work.bytes_min)
    least = floor(work, limits.product(labels.dtype), stream)
    times = {name: Quantiles.of(values) for name, values in samples.items()}
    ceilings = {"gemm_ceiling_pct": times.get(PRODUCTS), "read_ceiling_pct": times.get(READS)}
    implementations = {}
    for name, time in times.items():
        entry: dict[str, Any] = {
            "t_us": {key: value * 1e6 if key != "n" else value for key, value in asdict(time).items()},
            "sol_pct": 100 * least.seconds / time.p50,
            "gflops": work.flops / time.p50 / 1e9,
            "gbps": work.bytes_min / time.p50 / 1e9,
            "err": errors.get(name),
            **{key: None if top is None else 100 * top.p50 / time.p50 for key, top in ceilings.items()},
        }
        if (footprint := footprints.get(name)) is not None:
            entry |= {"launches": footprint.launches, "peak_mem_mb": footprint.peak_bytes / 1e6}
        implementations[name] = entry | {"samples_us": [round(value * 1e6, 2) for value in samples[name]]}
    ratios = {
        name: Ratio.of(samples[name], samples[FUSED][: len(samples[name])])
        for name in samples
        if name not in (FUSED, PRODUCTS, READS) and not name.endswith(AGAIN)
    }
    noise = noise_of(samples)
    left_out = {name: _unmeasured(peer, times[FUSED].p50) for name, peer in (unmeasured or {}).items()}
    missed = None
    if goal is not None:
        memory = None
        if goal.peer in footprints and FUSED in footprints:
            memory = footprints[goal.peer].peak_bytes / footprints[FUSED].peak_bytes
        if goal.peer in ratios:
            missed = goal.missed(ratios[goal.peer], noise, times[FUSED].p50 * 1e6, memory)
        else:
            missed = goal.missed_at_least(left_out[goal.peer]["at_least"], times[FUSED].p50 * 1e6)
    return {
        "suite": labels.suite,
        "op": labels.op,
        "shape": labels.shape,
        "dtype": dtype_name(labels.dtype),
        "pass": labels.mode,
        "tokens": labels.tokens,
        "cache": cache,
        "graph": labels.graph,
        "flops": work.flops,
        "bytes_min": work.bytes_min,
        "floor_us": least.seconds * 1e6,
        "bound": least.bound,
        "noise": noise,
        "goal": None if goal is None else asdict(goal),
        "missed": missed,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "unmeasured": left_out,
        "impls": implementations,
    }


def _unmeasured(peer: Unmeasured, fused_seconds: float) -> dict[str, Any]:
    """``at_least``: the speed-up over the peer is no less; None where nothing of it ran."""
    least = None if peer.seconds is None else peer.seconds / fused_seconds
    return {"reason": peer.reason, "seconds": peer.seconds, "at_least": least}


def noise_of(samples: Mapping[str, Sequence[float]]) -> float:
    """The largest factor by which two runs of the same variant differ, interval included; 1 where none ran twice."""
    for name, again in samples.items():
        if name.endswith(AGAIN):
            ratio = Ratio.of(samples[name.removesuffix(AGAIN)][: len(again)], again)
            return max(ratio.high, 1 / ratio.low)
    return 1.0
