"""A Python interpreter as a tool: one fresh process per call, under resource limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

_CHILD = Path(__file__).with_name("child.py")
_READ = 1 << 16  # bytes of each stream that can reach the model


class PythonTool:
    """Runs a call as a Python program; the result is what it printed, its last expression's value included.

    Each call has a process of its own, in isolated mode, with an empty environment, an empty temporary directory to
    work in, and limits on processor time, memory, file size and wall time; at the end its process group is killed.

    This bounds what a mistaken program can use up. It is NOT a security sandbox: the program runs as the same user and
    can read that user's files, use the network, and start processes that leave the group. Where the model's programs
    are not trusted, run everything in a container or a virtual machine, or give a `Tool` of your own that does.

    Args:
        seconds: of wall time, and of processor time (rounded up to whole seconds).
        memory: bytes of address space of a process.
        file_size: bytes of each file it writes, its output included.

    Raises:
        ValueError: a limit that is not positive, or a system without such limits.
    """

    name = "python"

    def __init__(self, seconds: float = 10.0, memory: int = 2 << 30, file_size: int = 16 << 20) -> None:
        for limit, value in (("seconds", seconds), ("memory", memory), ("file_size", file_size)):
            if not value > 0:
                raise ValueError(f"{limit}: {value} is not positive")
        if not hasattr(os, "waitid"):
            raise ValueError("tools: the python tool needs a system with POSIX process groups and resource limits")
        self.seconds, self.memory, self.file_size = seconds, memory, file_size

    def run(self, text: str) -> str:
        """Output, then ``[stderr]`` with errors, and ``[exit_code]`` or ``[timeout]`` where it did not end well."""
        limits = [str(int(-(-self.seconds // 1))), str(self.memory), str(self.file_size)]
        with (
            tempfile.TemporaryDirectory(prefix="recmas-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as program,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            program.write(text.encode("utf-8", errors="replace"))
            program.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(_CHILD), *limits],
                stdin=program,
                stdout=output,
                stderr=errors,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                ended = _ended(process.pid, time.monotonic() + self.seconds)
            finally:
                # Not yet reaped, so that its number still names its own group.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return _told(_text(output), _text(errors), process.returncode, None if ended else self.seconds)


def _ended(pid: int, deadline: float) -> bool:
    """Wait, without reaping it, for a child to end; False at the deadline."""
    pause = 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.05)
    return True


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_READ).decode("utf-8", errors="replace").strip("\n")


def _told(output: str, errors: str, status: int, timeout: float | None) -> str:
    parts = [output] if output else []
    if errors:
        parts.append(f"[stderr]\n{errors}")
    if timeout is not None:
        parts.append(f"[timeout] stopped after {timeout:g} s")
    elif status < 0:
        parts.append(f"[exit_code] killed by signal {-status}")
    elif status > 0:
        parts.append(f"[exit_code] {status}")
    return "\n".join(parts) or "(no output)"
