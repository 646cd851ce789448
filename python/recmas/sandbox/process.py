"""One call of foreign code: a process of its own, watched until it ends or is ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from recmas.sandbox import bubblewrap
from recmas.sandbox.places import readable

_LAUNCH = Path(__file__).with_name("launch.py")
_SYSCALLS = Path(__file__).with_name("syscalls.py")
_PAUSE = 0.02  # seconds between two looks at most; what no limit of the kernel bounds may overshoot for so long


@dataclass(frozen=True)
class Limits:
    """What one call may use up.

    Args:
        seconds: of wall time, and of processor time (rounded up to whole seconds).
        memory: bytes of address space.
        file_size: bytes of each file, standard output and standard error included.
        output: bytes of each of the two that are read back.
        disk: bytes of all its files together, in bubblewrap.
        files: of its own at once, in bubblewrap.
        open_files: open at once.
        threads: at once, under a sandbox; numerical libraries start one per processor.
    """

    seconds: float
    memory: int = 2 << 30
    file_size: int = 16 << 20
    output: int = 1 << 16
    disk: int = 64 << 20
    files: int = 4096
    open_files: int = 256
    threads: int = max(64, 2 * (os.cpu_count() or 1))

    def resources(self) -> dict[str, int]:
        """The limits that `launch` sets, by their names in `resource`."""
        return {
            "RLIMIT_CPU": int(-(-self.seconds // 1)),
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Finished:
    """How a call ended: what it wrote, its exit status (128 + n for signal n), and why it was stopped, if it was."""

    output: bytes
    errors: bytes
    status: int
    stopped: str | None


def run(script: Path | None, text: bytes, sandbox: str, limits: Limits, *, more: Sequence[Path] = ()) -> Finished:
    """Run a script of this package in a sandbox that was chosen (`choice.choose`).

    Args:
        script: run as a program by an isolated interpreter with an empty environment; None only tries the sandbox.
        text: its standard input.
        sandbox: one of `choice.SANDBOXES`.
        limits: beyond them it is ended.
        more: further paths that it may read.

    Raises:
        ValueError: the sandbox lacks something.
    """
    with (
        tempfile.TemporaryDirectory(prefix="recmas-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as filtering,
        tempfile.TemporaryFile() as info,
    ):
        given.write(text)
        given.seek(0)
        files = [_LAUNCH] if script is None else [_LAUNCH, script]
        paths = readable([*files, *more])
        confined = [*paths, str(_SYSCALLS), folder] if sandbox == "landlock" else None
        settings = json.dumps({"limits": limits.resources(), "readable": confined, "parent": os.getpid()})
        program = [sys.executable, "-I", "-B", "-X", "utf8", str(_LAUNCH), settings, *map(str, files[1:])]
        if sandbox == "bubblewrap":
            filtering.write(bubblewrap.filter_program())
            filtering.seek(0)
            program = [*bubblewrap.command(paths, limits.disk, filtering.fileno(), info.fileno()), *program]
        process = subprocess.Popen(
            program,
            stdin=given,
            stdout=output,
            stderr=errors,
            cwd=folder,
            env={},
            start_new_session=True,
            pass_fds=(filtering.fileno(), info.fileno()) if sandbox == "bubblewrap" else (),
        )
        exceeded: Callable[[], str | None] = {
            "bubblewrap": lambda: _exceeded(_inner(info), limits),
            "landlock": lambda: _exceeded(process.pid, limits),
            "none": lambda: None,
        }[sandbox]
        try:
            stopped = _wait(process.pid, limits.seconds, exceeded)
        finally:
            # Not yet reaped, so that its number still names its own group.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        return Finished(_head(output, limits.output), _head(errors, limits.output), status, stopped)


def _wait(pid: int, seconds: float, exceeded: Callable[[], str | None]) -> str | None:
    """Wait, without reaping it, for a child to end; why not, where it has to be ended."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return f"after {seconds:g} s"
        if (why := exceeded()) is not None:
            return why
        time.sleep(min(pause, left))
        pause = min(2 * pause, _PAUSE)
    return None


def _inner(info: IO[bytes]) -> int | None:
    """The number of the process that bubblewrap started, once it has said so.

    Read without moving the position in the file, which is also the one at which bubblewrap writes.
    """
    found = re.search(rb'"child-pid": (\d+),', os.pread(info.fileno(), 4096, 0))
    return None if found is None else int(found[1])


def _exceeded(pid: int | None, limits: Limits) -> str | None:
    """Which of the limits that no kernel keeps for us a process has passed: threads, and files of its own."""
    if pid is None:
        return None
    try:
        if len(os.listdir(f"/proc/{pid}/task")) > limits.threads:
            return f"at more than {limits.threads} threads"
        if os.stat(f"/proc/{pid}/root").st_dev == os.stat("/").st_dev:  # not in its own root, or not yet
            return None
        files = os.statvfs(f"/proc/{pid}/root{bubblewrap.WORK}")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended, or its root is not yet made
        return None
    return f"at more than {limits.files} files" if files.f_files - files.f_ffree > limits.files else None


def _head(file: IO[bytes], size: int) -> bytes:
    file.seek(0)
    return file.read(size)
