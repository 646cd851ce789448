"""The control groups around this process, by which Linux and containers bound what it may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of every group that may bound a resource, from the innermost outwards.

    Args:
        controller: of the resource, as version 1 calls it: "memory" or "cpu".
        root: of the file system, for tests.
    """
    for line in contents(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder != top and top not in folder.parents:
                break
            yield 1 if controllers else 2, folder


def contents(path: Path) -> str:
    """A file of the kernel's, or nothing where it has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
