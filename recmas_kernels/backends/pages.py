"""Memory of packed weights, in pages of 2 MB where the system has them.

A weight that is streamed from memory waits for the address of each page, too, and prefetching stops at the page's end
(docs/kernels.md, Huge pages). Most weights of small models are no page, so those of a frozen model lie side by side.
Pages are advice: where the system has none, or no more memory to map, torch's own allocator and small pages serve.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_CPU = torch.device("cpu")  # the default device may be another
_PAGE = 1 << 21
_BLOCK = 8 * _PAGE
_LINE = 64


def alone(size: int) -> Tensor:
    """Uint8 ``[size]`` with any values, that is given back by itself; from a page on, it begins with one."""
    if size < _PAGE:
        return torch.empty(size, dtype=torch.uint8, device=_CPU)
    try:
        return _piece(*_map(size), size)
    except OSError:  # it says neither how much nor for what; torch says so, if it has no memory either
        return torch.empty(size, dtype=torch.uint8, device=_CPU)


def together(size: int) -> Tensor:
    """As `alone`, for what lasts: up to 4 MB lie side by side in 16 MB, which are given back with the last of them."""
    if size > _BLOCK // 4:
        return alone(size)
    try:
        return _block.take(size)
    except OSError:
        return torch.empty(size, dtype=torch.uint8, device=_CPU)


class _Block:
    """What was mapped last for pieces that lie side by side; they keep it, and one that is full is followed by more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: weakref.ref[mmap.mmap] | None = None
        self._begin = 0  # of what is free

    def take(self, size: int) -> Tensor:
        """Uint8 ``[size]`` at the beginning of a cache line."""
        with self._lock:
            mapped = None if self._mapped is None else self._mapped()
            if mapped is None or self._begin + size > len(mapped):
                mapped, self._begin = _map(_BLOCK)
                self._mapped = weakref.ref(mapped)
            taken = _piece(mapped, self._begin, size)
            self._begin += -(-size // _LINE) * _LINE
            return taken


_block = _Block()


def _renew() -> None:
    global _block
    _block = _Block()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)  # the parent's lock may be held by a thread that the child has not


def _map(size: int) -> tuple[mmap.mmap, int]:
    """Memory with room for ``size`` bytes, and where they begin: with a page."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size), 0
    mapped = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % _PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Of whole pages alone, since the system gives them whole. A kernel may be built without them.
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE, begin, size // _PAGE * _PAGE)
    return mapped, begin


def _piece(mapped: mmap.mmap, begin: int, size: int) -> Tensor:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=begin)
