"""What foreign code may read: the system's libraries, the interpreter with its packages, and what its caller names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

SYSTEM = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/usr/share/zoneinfo",
)


def readable(more: Iterable[Path] = ()) -> list[str]:
    """Absolute paths, those that exist; of the interpreter's also where they lead to."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    own = sorted(prefixes | {os.path.realpath(prefix) for prefix in prefixes})
    paths = [*SYSTEM, *own, *(os.path.abspath(path) for path in more)]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]
