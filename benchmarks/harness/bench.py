"""One test's measurements on a CPU: timed in turn, recorded, held to their goals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.floors import Work
from benchmarks.harness.footprint import Footprint
from benchmarks.harness.goals import Goal
from benchmarks.harness.machine import Device, Limits
from benchmarks.harness.names import COMPILED, FUSED
from benchmarks.harness.record import Labels, Samples, dtype_name, make_record
from benchmarks.harness.time_bound import TimeBound, Unmeasured
from benchmarks.harness.timing import Call, Flush, measure, warm

FLUSH_BYTES = 128 * 2**20  # several times the last cache of the machines measured
LONG_COMPUTE = 5e-3  # seconds of arithmetic beside which the state of the caches at the start is nothing


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
        bound: TimeBound = TimeBound(),  # noqa: B008
        unmeasured: Mapping[str, Unmeasured] | None = None,
        extra: Mapping[str, Any] | None = None,
        settle: Callable[[Samples], Samples] | None = None,
    ) -> None:
        """Time ``variants`` ("fused" first), record the cell, and assert its goal in a full run.

        Args:
            labels: what is measured.
            variants: by name; `names.PRODUCTS` and `names.READS` among them are ceilings, no peers.
            work: of one call.
            errors: of each variant against float64, as the correctness gate found them.
            goal: the claim; None for none.
            seconds, rounds, twice, bound: as `timing.measure` takes them.
            unmeasured: peers that are no variants, and why: over their bound before this call.
            weighed: variants whose operators and memory are counted, in two more calls each; None takes
                those that ran in every round, but of cells with ``rounds`` only "fused".
            calls: calls of the op in one call of a variant, where one alone is too short to time.
            extra: more fields of the record.
            settle: called between timing and recording; may check what the timed calls gave, fill in ``errors`` then,
                and add samples that come out of others.
        """
        cache, prepare = self._caches(labels, work, calls) if self.benchmark.enabled else ("warm", _nothing)
        self.benchmark.group = f"{labels.suite} {labels.op} {labels.shape} {dtype_name(labels.dtype)} {labels.mode}"
        measured = measure(
            self.benchmark, variants, prepare=prepare, seconds=seconds, rounds=rounds, twice=twice, bound=bound
        )
        if measured is None:
            return
        samples = measured.samples if settle is None else settle(measured.samples)
        per_call = {name: [value / calls for value in values] for name, values in samples.items()}
        if weighed is None:
            full = [name for name in variants if len(samples.get(name, ())) == len(samples[FUSED])]
            weighed = () if calls > 1 else full if rounds is None else (FUSED,)
        footprints = {name: Footprint.of(variants[name], compiled=name in COMPILED) for name in weighed}
        left_out = {
            name: replace(peer, seconds=None if peer.seconds is None else peer.seconds / calls)
            for name, peer in {**(unmeasured or {}), **measured.unmeasured}.items()
        }
        record = make_record(labels, cache, work, self.limits, per_call, errors, footprints, goal, left_out)
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
