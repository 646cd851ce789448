"""Memory of packed weights: side by side in large pages, and given back."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import signal
import sys
from collections.abc import Callable
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
def block(monkeypatch: pytest.MonkeyPatch) -> pages._Block:
    """Nothing lies in it."""
    made = pages._Block()
    monkeypatch.setattr(pages, "_block", made)
    return made


def ends(piece: Tensor) -> tuple[int, int]:
    return piece.data_ptr(), piece.data_ptr() + piece.nbytes


def test_small_pieces_lie_side_by_side_and_apart() -> None:
    held = [pages.together(size) for size in SIZES]
    assert [piece.shape for piece in held] == [(size,) for size in SIZES]
    for number, piece in enumerate(held):
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(held))
    for before, after in itertools.pairwise(held):
        assert 0 <= after.data_ptr() - ends(before)[1] < 64
        assert after.data_ptr() % 64 == 0


@pytest.mark.parametrize("memory", [pages.alone, pages.together])
def test_large_piece_begins_with_a_page(memory: Callable[[int], Tensor]) -> None:
    small, large, other = pages.together(100), memory(5 * PAGE + 1), pages.together(100)
    assert large.data_ptr() % PAGE == 0
    large.fill_(1)
    assert other.data_ptr() - small.data_ptr() == 128


def test_full_memory_is_followed_by_more() -> None:
    held = [pages.together(PAGE) for _ in range(20)]
    spans = sorted(map(ends, held))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % PAGE == 0 for begin, _ in spans)


def test_threads_take_apart() -> None:
    with ThreadPoolExecutor(8) as threads:
        held = list(threads.map(pages.together, [96] * 400))
    assert len({piece.data_ptr() for piece in held}) == len(held)


def test_memory_goes_with_the_last_piece(block: pages._Block) -> None:
    first, second = pages.together(10), pages.together(10)
    mapped = block._mapped
    assert mapped is not None
    del first
    gc.collect()
    assert mapped() is not None
    second.fill_(3)
    del second
    gc.collect()
    assert mapped() is None
    pages.together(10).fill_(1)  # from new memory


def test_what_is_packed_for_a_while_pins_nothing(block: pages._Block) -> None:
    pages.alone(100).fill_(1)
    assert block._mapped is None


class _Refusing(mmap.mmap):
    """What a kernel without large pages maps."""

    def madvise(self, *_: int) -> None:
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("size", [100, 3 * PAGE])
def test_pages_are_advice(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.mmap, "mmap", _Refusing)
    piece = pages.together(size)
    assert (piece.shape, piece.fill_(1).sum().item()) == ((size,), size)


@pytest.mark.parametrize("size", [100, 3 * PAGE])
def test_without_memory_to_map_torch_serves_or_says_how_much_is_missing(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    assert pages.together(size).fill_(1).sum().item() == size
    with pytest.raises(RuntimeError, match=f"allocate {1 << 60} bytes"):
        pages.together(1 << 60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_takes_while_the_parent_held_the_lock(block: pages._Block) -> None:
    before = pages.together(64).fill_(1)
    with block._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # rather than wait for ever
            os._exit(0 if pages.together(64).fill_(2).sum().item() == 128 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert before.sum().item() == 64


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this system has no pages of 2 MB to be advised of"
)
@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("features", [64, 2048])
def test_packed_weights_ask_for_large_pages(features: int) -> None:
    frozen = FrozenLinear.from_linear(make_linear(features, features))
    assert frozen.panels is not None
    begin, end = ends(frozen.panels.data)
    assert "hg" in _flags(begin)
    assert ("hg" in _flags(end - 1)) is (features == 64 or end % PAGE == 0)  # a page that is not all used stays small
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
