"""What is claimed of a measurement; the claims themselves are in `suites/`, beside their cells."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.timing import Ratio

NEVER_BELOW = 0.95  # of eager, in any cell: a backend declines what it cannot win


@dataclass(frozen=True)
class Goal:
    """A claim: ``must`` and ``must_us`` are asserted in a full run, ``aim`` is only reported.

    Attributes:
        must: least speed-up over ``peer``.
        aim: the speed-up wished for; None where nothing beyond ``must`` is.
        must_us: most microseconds per call; None where only the speed-up counts.
        peer: whom the speed-up is over.
        must_memory: least ratio of the peer's peak memory to ours; None where only time counts.
    """

    must: float = NEVER_BELOW
    aim: float | None = None
    must_us: float | None = None
    peer: str = "eager"
    must_memory: float | None = None

    def missed(self, ratio: Ratio, noise: float, microseconds: float, memory: float | None = None) -> str | None:
        """What is missed, in words; None if nothing. "Slower than eager" needs a difference beyond the noise."""
        if ratio.value < self.must and not (self.must < 1 and ratio.is_within(noise)):
            return f"{ratio.value:.2f}x {self.peer} [{ratio.low:.2f}, {ratio.high:.2f}], must be {self.must:.2f}x"
        if self.must_us is not None and microseconds > self.must_us:
            return f"{microseconds:.1f} us per call, must be at most {self.must_us:g} us"
        if self.must_memory is not None and (memory is None or memory < self.must_memory):
            taken = "unknown" if memory is None else f"{memory:.2f}x"
            return f"memory of the {self.peer} {taken}, must be {self.must_memory:.2f}x ours"
        return None

    def missed_at_least(self, at_least: float | None, microseconds: float) -> str | None:
        """What is missed where the peer is over its time bound: only ``at_least``, a lower bound, can meet the goal."""
        if at_least is None:
            return f"the {self.peer} was not run, must be {self.must:.2f}x"
        if at_least < self.must:
            return f"at least {at_least:.2f}x {self.peer}, which is over its time bound; must be {self.must:.2f}x"
        return self.missed(Ratio(at_least, at_least, at_least), 1.0, microseconds)
