"""A device that fails while it is used: it disappears, its driver restarts, a kernel on it ends in an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OF_A_DEVICE = re.compile(r"(CUDA|HIP)( driver)? error|Triton Error \[")
_OF_A_PROGRAM = re.compile("assert|illegal|misaligned|invalid|captur", re.IGNORECASE)
"""In what a driver says of a wrong call or kernel, which no other device would run better."""


_OF_A_CONTEXT = re.compile("assert|illegal|misaligned", re.IGNORECASE)
"""A kernel's faults after which a driver refuses this process every further call."""


class DeviceError(RuntimeError):
    """A device failed; one line that says which and how."""


def failure(error: BaseException) -> str:
    """What an error says of the failure of a device, on one line; empty if it is about something else."""
    line = (str(error).strip().splitlines() or [""])[0]  # torch goes on with advice for whoever debugs kernels
    of_a_device = isinstance(error, RuntimeError) and _OF_A_DEVICE.search(line) and not _OF_A_PROGRAM.search(line)
    return line if of_a_device or isinstance(error, DeviceError) else ""


def is_final(error: BaseException) -> bool:
    """Whether this process cannot use the device any more, by what an error says."""
    line = str(error).partition("\n")[0]
    faulty = isinstance(error, RuntimeError) and _OF_A_DEVICE.search(line) and _OF_A_CONTEXT.search(line)
    return bool(faulty or failure(error))


@contextmanager
def named(work: str, *devices: torch.device) -> Iterator[None]:
    """A block in which the failure of a device becomes a `DeviceError` that names the work and where it ran."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceError) or not (line := failure(error)):
            raise
        raise DeviceError(f"{work} on {', '.join(sorted(set(map(str, devices))))}: {line}") from error
