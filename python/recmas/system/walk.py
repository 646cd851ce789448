"""`Walk`: the visits of a run and the messages between them; the one walk of the project.

One batch takes it visit by visit (`System.walk`). Many rows take it at once where agents are in several processes or
rows come and go (`recmas.scheduling`): then every visit may begin whose messages are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from recmas.config.pattern import Pattern, Visit

M = TypeVar("M")


class Walk(Generic[M]):
    """Which visits may begin, and what each of them reads.

    Args:
        pattern: of the system.
        rounds: of the run.
    """

    def __init__(self, pattern: Pattern, rounds: int) -> None:
        self._left = {visit: _sources(visit) for visit in pattern.visits(rounds)}
        self._under_way: list[Visit] = []
        self._messages: dict[tuple[str, int], M] = {}

    @property
    def done(self) -> bool:
        return not self._left and not self._under_way

    def ready(self) -> list[Visit]:
        """The visits that may begin, in the pattern's order."""
        there = self._messages.keys()
        return [visit for visit, sources in self._left.items() if there >= sources.keys()]

    def begin(self, visit: Visit) -> dict[str, M]:
        """Begin a visit that is ready; the messages that it reads, by sender, in slot order."""
        sources = self._left.pop(visit)
        self._under_way.append(visit)
        return {source[0]: self._messages[source] for source in sources}

    def change(self, change: Callable[[M], M]) -> None:
        """Put something else in the place of each message that is still to be read."""
        self._messages = {source: change(message) for source, message in self._messages.items()}

    def end(self, visit: Visit, message: M) -> None:
        """The visit has ended with this message; messages that nobody reads any more are dropped."""
        self._under_way.remove(visit)
        self._messages[visit.role, visit.round] = message
        left = self._left.values()
        self._messages = {
            source: held for source, held in self._messages.items() if any(source in sources for sources in left)
        }


def _sources(visit: Visit) -> dict[tuple[str, int], None]:
    """Role and round of every message that is read, in slot order."""
    return dict.fromkeys(zip(visit.senders, visit.sender_rounds, strict=True))
