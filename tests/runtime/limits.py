"""Work that must end within a limit of the operating system's, far above what it takes and far below a growing one."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
from collections.abc import Callable
from typing import Any


def within(seconds: int, action: Callable[[], Any]) -> Any:
    """What `action` returns, or raises, in a process of its own that may take so many seconds of processor time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        gc.freeze()  # no collection need look through what the tests before have left, nor copy its pages
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        try:
            result: tuple[str, Any] = ("returned", action())
        except Exception as error:
            result = ("raised", error)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGXCPU, f"took more than {seconds} seconds of processor time"
    assert status == 0, status
    how, value = pickle.loads(content)
    if how == "raised":
        raise value
    return value
