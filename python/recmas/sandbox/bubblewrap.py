"""The command line of bubblewrap: namespaces of its own for one call (https://github.com/containers/bubblewrap)."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence

WORK = "/tmp"
_FOLDER = f"{WORK}/call"  # empty, also where the interpreter itself is installed below WORK
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NOBODY = "65534"


def command(readable: Sequence[str], disk: int, filter_fd: int, info_fd: int) -> list[str]:
    """What stands before the program: it sees `readable`, and an empty `WORK` of `disk` bytes, the only place to write.

    There is no /proc, no terminal and no network device, and user and host have names that mean nothing. The program is
    the first process of its namespace, which ends with it.

    Raises:
        ValueError: bubblewrap is not installed.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise ValueError("bubblewrap is not installed (apt-get install bubblewrap)")
    arguments = [found, "--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--hostname", "sandbox"]
    arguments += ["--new-session", "--die-with-parent", "--as-pid-1", "--clearenv"]
    arguments += ["--size", str(disk), "--tmpfs", WORK, "--dir", _FOLDER, "--chdir", _FOLDER]
    for path in readable:
        arguments += ["--ro-bind", path, path]
    for device in _DEVICES:
        arguments += ["--dev-bind", device, device]
    return [*arguments, "--remount-ro", "/", "--seccomp", str(filter_fd), "--info-fd", str(info_fd), "--"]


@functools.cache
def filter_program() -> bytes:
    """The compiled filter of `syscalls`, as ``--seccomp`` reads it.

    Raises:
        ValueError: `seccompy` is missing, or knows no such processor.
    """
    try:
        from recmas.sandbox.syscalls import filter_of

        return filter_of().program
    except (ImportError, OSError) as error:
        raise ValueError(f"no filter of system calls can be made: {error}") from None
