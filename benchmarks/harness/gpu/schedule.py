"""How much is measured, in which order: copies, calls per graph, rounds, and the time that is left for all of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from time import monotonic

from benchmarks.harness.names import AGAIN
from benchmarks.harness.timing import MAX_ROUNDS, MIN_ROUNDS

COLD_FACTOR = 5  # copies of the operands fill so many times the L2 before the first is touched again
SHORT_CALL = 100e-6  # seconds below which one graph holds at least MIN_CALLS
MIN_CALLS = 50
GRAPH_SECONDS = 2e-3  # of longer calls one graph holds about this much


def copies(bytes_per_call: int, l2_bytes: int, *, cold: bool) -> int:
    """Copies of the operands that calls take in turn: 1 for a warm cell, else enough to exceed COLD_FACTOR times L2."""
    if not cold:
        return 1
    return max(1, math.ceil(COLD_FACTOR * l2_bytes / max(1, bytes_per_call)) + 1)


def calls_per_graph(seconds_per_call: float, sets: int) -> int:
    """Calls recorded in one graph: a multiple of ``sets`` operand sets, so that every set is used equally often."""
    wanted = MIN_CALLS if seconds_per_call < SHORT_CALL else math.ceil(GRAPH_SECONDS / seconds_per_call)
    return sets * max(1, math.ceil(wanted / sets))


def rounds(round_seconds: float, seconds: float) -> int:
    """Rounds of all variants: as many as fill ``seconds``, within [MIN_ROUNDS, MAX_ROUNDS]."""
    return min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds / round_seconds)))


def interleave(
    clocks: Mapping[str, Callable[[], float]],
    *,
    seconds: float,
    warm_seconds: float,
    twice: str | None = "eager",
    rounds_wanted: int | None = None,
    now: Callable[[], float] = monotonic,
) -> dict[str, list[float]]:
    """Run every clock once per round, in an order that changes, until enough rounds are had.

    Args:
        clocks: by variant; each runs the variant and returns seconds per call.
        seconds: wall time to aim at; it sets the number of rounds.
        warm_seconds: wall time of unrecorded rounds before, in which the device's clocks settle; at least one round.
        twice: the variant to run once more per round under its name + AGAIN; the ratio of equals is the noise.
        rounds_wanted: the number of rounds itself, where one takes seconds; then one round warms up.
        now: the wall clock.

    Returns:
        Seconds per call, by variant; entry i of each belongs to the same round.
    """
    turns = dict(clocks)
    if twice in turns:
        turns[twice + AGAIN] = turns[twice]
    order = random.Random(0)

    def turn() -> dict[str, float]:
        return {name: turns[name]() for name in order.sample(list(turns), len(turns))}

    begun, warmed = now(), 0
    while warmed == 0 or (rounds_wanted is None and now() - begun < warm_seconds):
        turn()
        warmed += 1
    needed = rounds_wanted or rounds((now() - begun) / warmed, seconds)
    taken = [turn() for _ in range(needed)]
    return {name: [times[name] for times in taken] for name in turns}


class Budget:
    """Wall time for a session; a cell begins only if what it is expected to take is left.

    Args:
        seconds: the whole; None for no limit.
        now: the wall clock.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self.seconds = seconds
        self._end = None if seconds is None else now() + seconds

    @property
    def left(self) -> float:
        return math.inf if self._end is None else self._end - self._now()

    def refusal(self, expected: float) -> str | None:
        """Why a cell of ``expected`` seconds does not begin; None if it may."""
        if self.left >= expected:
            return None
        return f"not run: {max(0.0, self.left):.0f} s of {self.seconds:.0f} s are left, it needs about {expected:.0f} s"
