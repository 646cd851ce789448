"""A Python interpreter as a tool: one fresh process per call, in a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recmas.sandbox import Finished, Limits, choose, run

_CHILD = Path(__file__).with_name("child.py")


class PythonTool:
    """Runs a call as a Python program; the result is what it printed, its last expression's value included.

    Each call has a process of its own, in isolated mode, with an empty environment, and limits on processor time,
    memory, file size and wall time. In a sandbox it reads the interpreter's files and the system's libraries alone, has
    no network and starts no process; bubblewrap gives it an empty temporary folder, Landlock nothing to write to.
    docs/guarantees.md says what that stops and what it does not.

    Args:
        seconds: of wall time, and of processor time (rounded up to whole seconds).
        memory: bytes of address space.
        file_size: bytes of each file it writes, its output included.
        sandbox: "bubblewrap", "landlock", or "none": a program can then do whatever this user can, and leave processes
            behind. By default the first of the two that works here.

    Raises:
        ValueError: a limit that is not positive, or a sandbox that does not work here.
    """

    name = "python"

    def __init__(
        self,
        seconds: float = 10.0,
        memory: int = 2 << 30,
        file_size: int = 16 << 20,
        sandbox: str | None = None,
    ) -> None:
        for limit, value in (("seconds", seconds), ("memory", memory), ("file_size", file_size)):
            if not value > 0:
                raise ValueError(f"{limit}: {value} is not positive")
        self.limits = Limits(seconds, memory, file_size)
        self.sandbox = choose(sandbox)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a tool that was sent to another process, perhaps on another machine.

        Raises:
            ValueError: its sandbox does not work there.
        """
        self.__dict__.update(state)
        choose(self.sandbox)

    def run(self, text: str) -> str:
        """Output, then ``[stderr]`` with errors, and ``[stopped]`` or ``[exit_code]`` where it did not end well."""
        return _told(run(_CHILD, text.encode("utf-8", errors="replace"), self.sandbox, self.limits))


def _told(finished: Finished) -> str:
    output, errors = (text.decode("utf-8", errors="replace").strip("\n") for text in (finished.output, finished.errors))
    parts = [output] if output else []
    if errors:
        parts.append(f"[stderr]\n{errors}")
    if finished.stopped is not None:
        parts.append(f"[stopped] {finished.stopped}")
    elif finished.status != 0:
        parts.append(f"[exit_code] {finished.status}")
    return "\n".join(parts) or "(no output)"
