"""Memory of packed weights: side by side in large pages, and given back."""

from __future__ import annotations

import gc
import itertools
import mmap
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recmas_kernels import FrozenLinear
from recmas_kernels.backends import cpu, pages
from tests.kernels.frozen import make_linear

PAGE = 1 << 21
SIZES = (1, 63, 64, 65, 5000, 221_184)


@pytest.fixture(autouse=True)
def nothing_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_shared", None)


def ends(piece: Tensor) -> tuple[int, int]:
    return piece.data_ptr(), piece.data_ptr() + piece.nbytes


def test_small_pieces_lie_side_by_side_and_apart() -> None:
    held = [pages.take(size) for size in SIZES]
    assert [piece.shape for piece in held] == [(size,) for size in SIZES]
    for number, piece in enumerate(held):
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(held))
    for before, after in itertools.pairwise(held):
        assert 0 <= after.data_ptr() - ends(before)[1] < 64
        assert after.data_ptr() % 64 == 0


def test_large_piece_begins_with_a_page() -> None:
    small, large, other = pages.take(100), pages.take(5 * PAGE + 1), pages.take(100)
    assert large.data_ptr() % PAGE == 0
    large.fill_(1)
    assert other.data_ptr() - small.data_ptr() == 128


def test_full_memory_is_followed_by_more() -> None:
    held = [pages.take(PAGE) for _ in range(20)]
    spans = sorted(map(ends, held))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % PAGE == 0 for begin, _ in spans)


def test_threads_take_apart() -> None:
    with ThreadPoolExecutor(8) as threads:
        held = list(threads.map(pages.take, [96] * 400))
    assert len({piece.data_ptr() for piece in held}) == len(held)


def test_memory_goes_with_the_last_piece() -> None:
    first, second = pages.take(10), pages.take(10)
    assert pages._shared is not None
    mapped: weakref.ref[mmap.mmap] = pages._shared
    del first
    gc.collect()
    assert mapped() is not None
    second.fill_(3)
    del second
    gc.collect()
    assert mapped() is None
    pages.take(10).fill_(1)  # from new memory


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no advice about pages")
@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("features", [64, 2048])
def test_packed_weights_ask_for_large_pages(features: int) -> None:
    frozen = FrozenLinear.from_linear(make_linear(features, features))
    assert frozen.panels is not None
    begin, end = ends(frozen.panels.data)
    assert "hg" in _flags(begin)
    assert "hg" in _flags(end - 1)
    assert "hg" not in _flags(torch.ones(1 << 20).data_ptr())  # else the system marks all memory


def _flags(address: int) -> list[str]:
    """What the system notes of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (span := line.split()[0]) and not span.endswith(":"):
            low, high = (int(part, 16) for part in span.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x} on {sys.platform}")
