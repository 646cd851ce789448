"""Wall time for tests: it passes only where it is told to."""

from __future__ import annotations


class FakeClock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def takes(self, seconds: float) -> float:
        self.time += seconds
        return seconds
