"""Signals that ask the process to end, held back while something is in no state to be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Pending:
    """The signal that has arrived, if one has."""

    number: int | None = None


@contextmanager
def held_back() -> Iterator[Pending]:
    """Within, a signal that asks the process to end is noted only; it takes effect when the block has ended well.

    So a loop may look between two steps, and write down where it stands. A second signal takes effect at once. Signals
    that are ignored stay ignored (a command under nohup outlives its terminal); outside of the main thread, which alone
    gets signals, nothing is changed.
    """
    pending = Pending()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(number: int, frame: FrameType | None) -> None:
        if pending.number is not None:
            restore()
            signal.raise_signal(number)
        pending.number = number

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield pending
    finally:
        restore()
    if pending.number is not None:
        signal.raise_signal(pending.number)
