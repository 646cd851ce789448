"""Starts a script of this package where it can do no harm: ``python -I launch.py SETTINGS [SCRIPT]``.

SETTINGS is JSON: ``limits`` by resource, for Landlock ``readable`` (paths) or null, the number of the ``parent``.
Limits are set here, because a function that runs between fork and exec can deadlock beside torch's threads. Without a
script it only tries whether all of this works. Standard library, and for Landlock `landlockpy` and `seccompy`.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys

LEAST_ABI = 3
"""Of Landlock: earlier ones let files be emptied that may not be written (Linux 6.2 has this one)."""


def limit(limits: dict[str, int]) -> None:
    """Bound this process; a limit that already is lower stays."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def confine(readable: list[str], parent: int) -> None:
    """From here on this process reads these paths alone, writes and executes nothing, and meets no other process.

    It ends with its parent.
    """
    import ctypes.util

    # Both packages look for libc with programs like ldconfig; the one that is loaded serves, and starts no process.
    ctypes.util.find_library = lambda name: None
    from landlockpy import AccessFS, Ruleset, Scope, abi_version

    if abi_version() < LEAST_ABI:
        sys.exit(f"Landlock has version {abi_version()} here, {LEAST_ABI} is needed (Linux 6.2)")
    end_with_parent, kill = 1, 9  # PR_SET_PDEATHSIG, SIGKILL
    ctypes.CDLL(None).prctl(end_with_parent, kill)
    if os.getppid() != parent:
        sys.exit("the caller has ended")
    with Ruleset(scoped=Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL) as rules:
        for path in readable:
            rules.allow_path(path, AccessFS.READ_FILE | (AccessFS.READ_DIR if os.path.isdir(path) else AccessFS.NONE))
        rules.allow_path(os.devnull, AccessFS.READ_FILE | AccessFS.WRITE_FILE)
        rules.restrict()
    runpy.run_path(os.path.join(os.path.dirname(__file__), "syscalls.py"))["filter_of"](os.getpid()).load()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    limit(settings["limits"])
    if settings["readable"] is not None:
        confine(settings["readable"], settings["parent"])
    sys.argv = sys.argv[2:]
    if sys.argv:
        runpy.run_path(sys.argv[0], run_name="__main__")
