"""Free memory of a device, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from recmas.files.control_groups import contents, groups

_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: limit, use, and the page cache that can be had back."""


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """What new tensors can fill on `device`; None where the machine does not say.

    On CUDA devices what the driver has left and what torch's allocator keeps for re-use; on the CPU the kernel's
    estimate of available memory, or what the process's control groups (versions 1 and 2) still allow, if less.

    Args:
        device: any.
        root: of the file system, for tests.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    available = _available(root / "proc/meminfo")
    known = [*([] if available is None else [available]), *_group_allowances(root)]
    return min(known, default=None)


def _available(meminfo: Path) -> int | None:
    """Linux's own estimate of what can be had without swapping."""
    for line in contents(meminfo).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _group_allowances(root: Path) -> Iterator[int]:
    """Limit minus use of every memory control group around this process; page cache does not count as used."""
    for version, folder in groups("memory", root):
        limit, use, cached = _NAMES[version]
        allowed, used = contents(folder / limit).strip(), contents(folder / use).strip()
        if allowed.isdigit() and used.isdigit():
            statistics = dict(line.split() for line in contents(folder / "memory.stat").splitlines())
            yield max(0, int(allowed) - int(used) + int(statistics.get(cached, 0)))
