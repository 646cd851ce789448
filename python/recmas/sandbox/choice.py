"""Which sandbox serves on this machine, found by trying it."""

from __future__ import annotations

import functools
import os
import sys

from recmas.sandbox.process import Limits, run

SANDBOXES = ("bubblewrap", "landlock", "none")
"""In the order in which they are chosen; "none" is never chosen, only asked for."""

_TRIAL = Limits(seconds=20.0)


def choose(sandbox: str | None = None) -> str:
    """The sandbox of that name, or by default the first that works here.

    Raises:
        ValueError: it does not work here, or none does; one line that says why.
    """
    if sandbox is not None and sandbox not in SANDBOXES:
        raise ValueError(f"sandbox: {sandbox!r} is not one of {', '.join(SANDBOXES)}")
    if not hasattr(os, "waitid"):
        raise ValueError("sandbox: foreign code needs a system with POSIX process groups and resource limits")
    if sandbox == "none":
        return sandbox
    if sandbox is not None and (reason := _reason(sandbox)) is not None:
        raise ValueError(f"sandbox: {sandbox} does not work here: {reason}")
    asked = SANDBOXES[:-1] if sandbox is None else (sandbox,)
    for name in asked:
        if _reason(name) is None:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons().items())
    raise ValueError(
        f"sandbox: none works here ({told}); foreign code runs without one only when asked to: --unsafe, or "
        "sandbox='none'"
    )


def reasons() -> dict[str, str | None]:
    """For each sandbox, why it does not work here; None where it does."""
    return {name: _reason(name) for name in SANDBOXES[:-1]}


@functools.cache
def _reason(sandbox: str) -> str | None:
    """What an empty call of a sandbox dies of."""
    if sys.platform != "linux":
        return "it needs Linux"
    if not os.path.isdir("/proc/self/task"):
        return "it needs /proc, by which it is watched"
    try:
        tried = run(None, b"", sandbox, _TRIAL)
    except (ValueError, OSError) as error:
        return str(error)
    if tried.stopped is not None:
        return f"an empty call was stopped {tried.stopped}"
    if tried.status == 0:
        return None
    lines = tried.errors.decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"an empty call ended with status {tried.status}"
