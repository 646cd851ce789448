"""Kernels that each answer one question about the device: how fast L2 is read, how long a launch takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 4096  # elements that a program reads at once: 16 KB
REPEATS = 16


@triton.jit
def _read(source, sums, elements, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    """Reads all of ``source [elements]`` REPEATS times, by all programs together; past L1, and summed so that it is."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.float32)
    for repeat in range(REPEATS):
        # Another part each time, so that no program finds its own again in L1.
        first = (program + repeat) % programs
        for block in range(first, elements // BLOCK, programs):
            total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total))


class L2Read:
    """Call it to read a buffer of about ``size`` bytes REPEATS times; all but the first come out of L2."""

    def __init__(self, size: int) -> None:
        self._elements = size // 4 // BLOCK * BLOCK
        self._source = torch.ones(self._elements, device="cuda")
        self._programs = 2 * torch.cuda.get_device_properties(self._source.device).multi_processor_count
        self._sums = torch.empty(self._programs, device="cuda")
        self.bytes_per_call = self._elements * 4 * REPEATS

    def __call__(self) -> None:
        _read[(self._programs,)](self._source, self._sums, self._elements, REPEATS, BLOCK, num_warps=8)


@triton.jit
def _nothing(place):
    """The shortest kernel there is: one program, one store."""
    tl.store(place, 1.0)


@triton.jit
def _nothing_early(place):
    """The same, joined to its neighbours by programmatic dependent launch."""
    gdc_launch_dependents()
    gdc_wait()
    tl.store(place, 1.0)


def empty_launch(place: torch.Tensor) -> None:
    """One short kernel; between two of them in a graph lies the gap between launches."""
    _nothing[(1,)](place, num_warps=1)


def early_launch(place: torch.Tensor) -> None:
    """One short kernel that may start while the one before it ends (sm_90)."""
    _nothing_early[(1,)](place, num_warps=1, launch_pdl=True)
