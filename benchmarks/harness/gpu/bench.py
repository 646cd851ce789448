"""One measured cell on a GPU: every variant a CUDA graph of many calls, the graphs replayed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import Any, TypeVar

import torch

from benchmarks.harness.floors import Work
from benchmarks.harness.footprint import Footprint
from benchmarks.harness.gpu import cuda, schedule
from benchmarks.harness.gpu.forecast import DEVICE, Forecast, misses
from benchmarks.harness.gpu.run_file import RunFile
from benchmarks.harness.names import FUSED, PRODUCTS
from benchmarks.harness.record import Labels, make_record
from benchmarks.harness.timing import Call, Quantiles

CELL_SECONDS, CELL_WARM_SECONDS = 1.0, 0.5
ANSWER_SECONDS, ANSWER_WARM_SECONDS = 0.3, 0.2
HOST_CALLS = 50  # bare calls in one timing, where the host is what is measured
LONG_CALL = 1e-3  # seconds from which one bare call is a timing of its own
UNTIMED_SETS = 2  # copies where nothing is timed: enough to show that they are taken in turn

Result = TypeVar("Result")
Builders = Mapping[str, Callable[[], Sequence[Call]]]


@dataclass
class GpuBench:
    """Measures the cells of one test.

    Attributes:
        run: where results go.
        device: where tensors belong.
        limits: the device's measured rates (`GpuLimits`).
        facts: `cuda.facts()`; None without a device: then every variant runs once, and nothing is timed.
    """

    run: RunFile
    device: torch.device
    limits: Any = None
    facts: Mapping[str, Any] | None = None

    def sets(self, bytes_per_call: int, *, cold: bool) -> int:
        """Copies of the operands that calls which move so many bytes take in turn."""
        if self.facts is None:
            return UNTIMED_SETS if cold else 1
        return schedule.copies(bytes_per_call, self.facts["l2_bytes"], cold=cold)

    def measure(
        self,
        labels: Labels,
        builders: Builders,
        work: Work,
        errors: Mapping[str, float],
        forecast: Forecast | None = None,
        *,
        rounds: int | None = None,
        twice: str = "eager",
    ) -> None:
        """Time ``builders`` ("fused" among them) and keep the record.

        Args:
            labels: what is measured; without ``graph`` the calls run bare, and the host is part of their time.
            builders: by implementation: build its calls, one per copy of the operands, all doing the same work. A peer
                that cannot be built or recorded is left out, and the record says why.
            work: of one call.
            errors: of each implementation against float64, as the correctness gate found them.
            forecast: what was forecast; kept only on the device that it is for.
            rounds: how many, where one takes seconds.
            twice: the peer that is timed twice, for the noise.
        """
        failed: dict[str, str] = {}
        footprints: dict[str, Footprint] = {}
        clocks = self._clocks(builders, labels.graph, failed, footprints)
        if self.facts is None:
            return
        samples = _best_products(
            _interleave(clocks, CELL_SECONDS, CELL_WARM_SECONDS, rounds_wanted=rounds, twice=twice)
        )
        cache = "cold" if labels.cold else "warm"
        record = make_record(labels, cache, work, self.limits, samples, errors, footprints, None)
        record["clock_mhz"], record["celsius"] = cuda.clock_and_temperature()
        record["failed_peers"] = failed
        if forecast is not None and DEVICE in self.facts["name"]:
            record["forecast"] = asdict(forecast)
            record["missed"] = "; ".join(misses(record["forecast"], record)) or None
        self.run.add(record)
        clocks.clear()
        cuda.release()

    def seconds_of(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """What a call takes until the device has done all of it, and what it returns."""
        begun = perf_counter()
        result = call()
        if self.facts is not None:
            cuda.synchronize()
        return perf_counter() - begun, result

    def answer(self, question: str, what: str, builders: Builders, *, work: Work | None = None, **values: Any) -> None:
        """Time ``builders`` as graphs, none of them under test, as the answer to a question; see `RunFile.answer`.

        Args:
            question: whose answer this is.
            what: the case.
            builders: as in `measure`.
            work: of one call, for the bandwidth and the rate.
            values: further facts.
        """
        failed: dict[str, str] = {}
        clocks = self._clocks(builders, True, failed, {})
        if self.facts is None:
            return
        samples = _interleave(clocks, ANSWER_SECONDS, ANSWER_WARM_SECONDS, twice=None)
        times = {name: Quantiles.of(taken) for name, taken in samples.items()}
        micros = {name: microseconds(time) for name, time in times.items()}
        if work is not None:
            values["gbps"] = {name: work.bytes_min / time.p50 / 1e9 for name, time in times.items()}
            values["tflops"] = {name: work.flops / time.p50 / 1e12 for name, time in times.items()}
        self.run.answer(question, what, t_us=micros, failed=failed, **values)
        clocks.clear()
        cuda.release()

    def _clocks(
        self, builders: Builders, graph: bool, failed: dict[str, str], footprints: dict[str, Footprint]
    ) -> dict[str, Callable[[], float]]:
        """What times one call of each implementation; without a device each call runs once, and must run."""
        clocks = {}
        for name, build in builders.items():
            try:
                calls = build()
                if self.facts is None:
                    for call in calls:
                        call()
                    continue
                clock = graph_clock(calls) if graph else host_clock(calls)
                if name in (FUSED, "eager"):
                    footprints[name] = Footprint(cuda.launches(calls[0]), cuda.peak_bytes(calls[0]))
            except Exception as error:  # a peer may fail in ways of its own; what is under test may not
                if name == FUSED or self.facts is None:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                continue
            clocks[name] = clock
        return clocks


def graph_clock(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds per call of a CUDA graph of ``calls`` in turn, as many of them as `schedule.calls_per_graph` says."""
    graph, count = cuda.Graph(calls, len(calls)), len(calls)
    wanted = schedule.calls_per_graph(graph.seconds() / count, len(calls))
    if wanted != count:
        graph, count = cuda.Graph(calls, wanted), wanted
    return lambda: graph.seconds() / count


def host_clock(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds per call of bare calls in turn, the host's part included, until the device has done them all."""

    def run(count: int) -> float:
        cuda.synchronize()
        begun = perf_counter()
        for call in islice(cycle(calls), count):
            call()
        cuda.synchronize()
        return (perf_counter() - begun) / count

    run(2 * len(calls))
    count = 1 if run(1) > LONG_CALL else HOST_CALLS
    return lambda: run(count)


def microseconds(time: Quantiles) -> dict[str, float]:
    """``time`` as records have it."""
    return {"p20": time.p20 * 1e6, "p50": time.p50 * 1e6, "p80": time.p80 * 1e6, "n": time.n}


def _interleave(
    clocks: dict[str, Callable[[], float]], seconds: float, warm: float, **more: Any
) -> dict[str, list[float]]:
    """`schedule.interleave` without Python's garbage collector, which would slow one variant or another."""
    gc.collect()
    gc.disable()
    try:
        return schedule.interleave(clocks, seconds=seconds, warm_seconds=warm, **more)
    finally:
        gc.enable()


PRODUCTS_LT = PRODUCTS + " (cublasLt)"


def under_lt(call: Call) -> None:
    """``call`` with its plain products in cublasLt."""
    with cuda.blas("cublaslt"):
        call()


def _best_products(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of the library's two sets of products keep the faster, as the ceiling."""
    if PRODUCTS_LT not in samples:
        return samples
    other = samples.pop(PRODUCTS_LT)
    if PRODUCTS not in samples or Quantiles.of(other).p50 < Quantiles.of(samples[PRODUCTS]).p50:
        samples[PRODUCTS] = other
    return samples
