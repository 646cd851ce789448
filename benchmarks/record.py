"""One measured cell: timed side by side, written down with every column, and held to its goal.

A record is a JSON object: labels (suite, op, shape, dtype, pass, tokens, cache, graph), the work and its floor, one
entry per implementation (times, share of the floor, rates, error, launches, memory, raw samples) and the ratios of
every peer to the implementation under test, which is called "fused" throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.baselines import COMPILED, PRODUCTS
from benchmarks.floors import Work, floor
from benchmarks.footprint import Footprint
from benchmarks.machine import Device, Limits
from benchmarks.shapes import Goal
from benchmarks.timing import AGAIN, Call, Flush, Quantiles, Ratio, measure, warm

SCHEMA = 1
FLUSH_BYTES = 128 * 2**20  # several times the last cache of the machines measured
LONG_COMPUTE = 5e-3  # seconds of arithmetic beside which the state of the caches at the start is nothing
FUSED = "fused"
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


@dataclass
class Bench:
    """Measures cells for one test.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        device: the machine's name and features.
        limits: its measured rates.
        full: the full grid runs: goals are asserted.
    """

    benchmark: Any
    device: Device
    limits: Limits
    full: bool

    def run(
        self,
        labels: Labels,
        variants: Mapping[str, Call],
        work: Work,
        errors: Mapping[str, float],
        goal: Goal | None = None,
        *,
        seconds: float = 2.0,
        rounds: int | None = None,
        weighed: Collection[str] | None = None,
        calls: int = 1,
        twice: str | None = "eager",
        extra: Mapping[str, Any] | None = None,
        settle: Callable[[Samples], Samples] | None = None,
    ) -> None:
        """Time ``variants`` ("fused" first), record the cell, and assert its goal in a full run.

        Args:
            labels: what is measured.
            variants: by name; `baselines.PRODUCTS` among them is a ceiling, not a peer.
            work: of one call.
            errors: of each variant against float64, as the correctness gate found them.
            goal: the claim; None for none.
            seconds, rounds, twice: as `timing.measure` takes them.
            weighed: variants whose operators and memory are counted, in two more calls each; None takes all, but of
                cells with ``rounds`` only "fused".
            calls: calls of the op in one call of a variant, where one alone is too short to time.
            extra: more fields of the record.
            settle: called between timing and recording; may check what the timed calls gave, fill in ``errors`` then,
                and add samples that come out of others.
        """
        cache, prepare = self._caches(labels, work, calls) if self.benchmark.enabled else ("warm", _nothing)
        self.benchmark.group = f"{labels.suite} {labels.op} {labels.shape} {_name(labels.dtype)} {labels.mode}"
        samples = measure(self.benchmark, variants, prepare=prepare, seconds=seconds, rounds=rounds, twice=twice)
        if samples is None:
            return
        if settle is not None:
            samples = settle(samples)
        per_call = {name: [value / calls for value in values] for name, values in samples.items()}
        if weighed is None:
            weighed = () if calls > 1 else variants if rounds is None else (FUSED,)
        footprints = {name: Footprint.of(variants[name], compiled=name in COMPILED) for name in weighed}
        record = make_record(labels, cache, work, self.limits, per_call, errors, footprints, goal)
        record["clock_mhz"] = self.device.clock_mhz()
        record.update(extra or {})
        self.benchmark.extra_info["record"] = record
        if self.full and goal is not None:
            assert record["missed"] is None, record["missed"]

    def _caches(self, labels: Labels, work: Work, calls: int) -> tuple[str, Callable[[Call], None]]:
        """State of the caches before a timed call, in a word, and what brings it about."""
        if labels.cold:
            return "cold", Flush(FLUSH_BYTES)
        if calls > 1:
            return "warm", _nothing
        if work.bytes_min >= FLUSH_BYTES or work.flops / self.limits.product(labels.dtype) > LONG_COMPUTE:
            return "in turn", _nothing
        return "warm", warm


def _nothing(call: Call) -> None:
    """Leave the caches as the calls before left them."""


def _name(dtype: torch.dtype) -> str:
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
) -> dict[str, Any]:
    """The record of a cell from its samples: seconds per call by implementation, caches ``cache`` before each."""
    stream = limits.memory_stream if cache == "cold" else limits.stream(work.bytes_min)
    least = floor(work, limits.product(labels.dtype), stream)
    times = {name: Quantiles.of(values) for name, values in samples.items()}
    ceiling = times.get(PRODUCTS)
    implementations = {}
    for name, time in times.items():
        entry: dict[str, Any] = {
            "t_us": {key: value * 1e6 if key != "n" else value for key, value in asdict(time).items()},
            "sol_pct": 100 * least.seconds / time.p50,
            "gflops": work.flops / time.p50 / 1e9,
            "gbps": work.bytes_min / time.p50 / 1e9,
            "err": errors.get(name),
            "gemm_ceiling_pct": None if ceiling is None else 100 * ceiling.p50 / time.p50,
        }
        if (footprint := footprints.get(name)) is not None:
            entry |= {"launches": footprint.launches, "peak_mem_mb": footprint.peak_bytes / 1e6}
        implementations[name] = entry | {"samples_us": [round(value * 1e6, 2) for value in samples[name]]}
    ratios = {
        name: Ratio.of(samples[name], samples[FUSED])
        for name in samples
        if name not in (FUSED, PRODUCTS) and not name.endswith(AGAIN)
    }
    noise = noise_of(samples)
    missed = None
    if goal is not None:
        memory = None
        if goal.peer in footprints and FUSED in footprints:
            memory = footprints[goal.peer].peak_bytes / footprints[FUSED].peak_bytes
        missed = goal.missed(ratios[goal.peer], noise, times[FUSED].p50 * 1e6, memory)
    return {
        "suite": labels.suite,
        "op": labels.op,
        "shape": labels.shape,
        "dtype": _name(labels.dtype),
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
        "impls": implementations,
    }


def noise_of(samples: Mapping[str, Sequence[float]]) -> float:
    """The largest factor by which two runs of the same variant differ, interval included; 1 where none ran twice."""
    for name, again in samples.items():
        if name.endswith(AGAIN):
            ratio = Ratio.of(samples[name.removesuffix(AGAIN)], again)
            return max(ratio.high, 1 / ratio.low)
    return 1.0
