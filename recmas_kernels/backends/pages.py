"""Memory of packed weights, in pages of 2 MB where the system has them.

A weight that is streamed from memory waits for the address of each page, too, and prefetching stops at the page's end
(docs/kernels.md, Huge pages). Most weights of small models are no page, so they lie side by side.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch
from torch import Tensor

_PAGE = 1 << 21
_SHARED = 8 * _PAGE
"""Bytes that are mapped at once for weights of at most a quarter of it."""
_LINE = 64

_lock = threading.Lock()
_shared: weakref.ref[mmap.mmap] | None = None  # mapped last; whoever lies in it keeps it
_begin = 0  # of what is free there


def take(size: int) -> Tensor:
    """Uint8 ``[size]`` with any values, at the beginning of a cache line. It is given back with all that lie beside it.

    Raises:
        OSError: there is no memory.
    """
    global _shared, _begin
    if size > _SHARED // 4:
        mapped, begin = _map(size)
        return _piece(mapped, begin, size)
    with _lock:
        held = None if _shared is None else _shared()
        if held is None or _begin + size > len(held):
            held, _begin = _map(_SHARED)
            _shared = weakref.ref(held)
        taken = _piece(held, _begin, size)
        _begin += -(-size // _LINE) * _LINE
        return taken


def _map(size: int) -> tuple[mmap.mmap, int]:
    """Memory of its own with room for ``size`` bytes, and where they begin: with a page."""
    pages = -(-size // _PAGE) * _PAGE
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, pages), 0
    # Private: a forked process that packs goes on in copies of its own.
    mapped = mmap.mmap(-1, pages + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mapped, 0
    begin = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % _PAGE
    mapped.madvise(mmap.MADV_HUGEPAGE, begin, pages)
    return mapped, begin


def _piece(mapped: mmap.mmap, begin: int, size: int) -> Tensor:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=begin)
