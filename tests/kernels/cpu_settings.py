"""What the tests of the compiled CPU kernels share: instruction sets, threads, guard bands, layouts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from recmas_kernels import use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu.module import isa_in_use, kernels

AVAILABLE = cpu.ISAS[: kernels().best_isa() + 1] if cpu.unavailable() is None else ()
GUARD = 256  # bytes each side of a guarded buffer


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, RECMAS_CPU_ISA=name):
        isa_in_use.cache_clear()
        with use_backend("cpu"):
            yield
    isa_in_use.cache_clear()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def guarded_allocations(expected: bool = True) -> Iterator[None]:
    """What is allocated without values starts as NaN between guard bands, which are checked at the end.

    If none is ``expected``, there may be none. No scratch memory is kept from one call to the next meanwhile.
    """
    allocate, guarded = torch.empty, []

    def empty(*sizes: int | torch.Size, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
        shape = torch.Size(sizes[0] if isinstance(sizes[0], tuple) else sizes)
        itemsize = torch.zeros((), dtype=dtype).element_size()
        size = shape.numel() * itemsize
        band = allocate(size + 2 * GUARD + 64, dtype=torch.uint8).fill_(0xAA)
        start = GUARD + -(band.data_ptr() + GUARD) % 64
        band[start : start + size] = 0xFF  # NaN in every floating dtype
        guarded.append((band, start, start + size))
        return band[start : start + size].view(dtype).view(shape)

    def empty_like(tensor: Tensor) -> Tensor:
        return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def new_empty(tensor: Tensor, *sizes: int) -> Tensor:
        return empty(*sizes, dtype=tensor.dtype, device=tensor.device)

    with (
        cpu.fresh_scratch(),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield
    assert guarded or not expected
    for band, start, end in guarded:
        assert (band[:start] == 0xAA).all(), "a kernel wrote before its buffer"
        assert (band[end:] == 0xAA).all(), "a kernel wrote past its buffer"


LAYOUTS = ("contiguous", "columns", "odd stride", "every other row", "every other column", "transposed")


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """``rows [T, n]`` with other strides; the memory between its elements is NaN."""
    junk = torch.full_like(rows, float("nan"))
    if layout == "columns":
        return torch.cat([junk, rows, junk], 1)[:, rows.shape[1] : 2 * rows.shape[1]]
    if layout == "odd stride":
        return torch.cat([junk[:, :1], rows, junk[:, :2]], 1)[:, junk[:, :1].shape[1] :][:, : rows.shape[1]]
    if layout == "every other row":
        return torch.stack([rows, junk], 1)[:, 0]
    if layout == "every other column":
        return torch.stack([rows, junk], 2)[..., 0]
    return rows.t().contiguous().t() if layout == "transposed" else rows
