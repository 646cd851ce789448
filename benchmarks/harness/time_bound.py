"""How long a peer may take. A call beyond the bound ends the peer's measurement, and the record says so.

A library may lack a fast product for a dtype on one processor and take hundreds of times as long as on another. Bounds
keep a run short there. They apply to peers alone: what is under test is always measured in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

CALL_SECONDS = 5.0  # one call of a peer may take so long
ALL_SECONDS = 10.0  # and all its timed calls of one cell together, at LEAST_ROUNDS of them
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Unmeasured:
    """Why a peer has no times in a record.

    Attributes:
        reason: in words.
        seconds: that one call of it takes at least; None where none ran.
    """

    reason: str
    seconds: float | None = None


@dataclass(frozen=True)
class TimeBound:
    """The time that a peer may take.

    Attributes:
        call_seconds: for one call.
        all_seconds: for the timed calls of one cell.
        now: the clock, in seconds.
    """

    call_seconds: float = CALL_SECONDS
    all_seconds: float = ALL_SECONDS
    now: Callable[[], float] = perf_counter

    def seconds_of(self, call: Callable[[], object]) -> float:
        """Run ``call`` once and return its time."""
        start = self.now()
        call()
        return self.now() - start

    def over(self, seconds: float, where: str = "") -> Unmeasured | None:
        """What to record of a peer whose call took ``seconds``, if that is too long; ``where`` tells which call."""
        if seconds <= self.call_seconds:
            return None
        return Unmeasured(f"over its bound of {self.call_seconds:g} s{where}", self.call_seconds)

    def probe(self, call_on: Callable[[int], object], rows: int) -> Unmeasured | None:
        """Call a peer on 1, 2, 4, ... and at last on all ``rows``; stop where it is over the bound.

        A call on fewer rows takes no longer than one on all, so the bound holds for all rows, too. Twice the bound is
        the most that the last call is expected to take, where one call on all rows could take minutes.

        Args:
            call_on: runs the peer on so many rows. It must compile nothing.
            rows: of the cell, at least 1.
        """
        count = 1
        while True:
            seconds = self.seconds_of(lambda: call_on(count))  # noqa: B023
            if (found := self.over(seconds, f" on {count} of {rows} rows")) is not None or count == rows:
                return found
            count = min(2 * count, rows)

    def rounds(self, seconds: float, least: int = LEAST_ROUNDS) -> int:
        """Rounds that a peer takes part in, whose call takes ``seconds``."""
        return max(least, int(self.all_seconds / seconds)) if seconds > 0 else 10**9
