"""Packed CPU weights: copies in the layout that the kernels stream, kept for the time of a `packed` scope.

A copy cannot know that its weight was written: fused optimisers, writes through ``.data`` and other processes bump no
version. So copies exist only inside a scope whose owner promises not to write, and everywhere else the kernels read
weights as they are stored. Both ways sum in the same order, so a scope changes no bit of any result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recmas_kernels.backends import settings

Layout = tuple[torch.dtype, int]  # compute dtype, instruction set
Packable = nn.Module | Tensor
Stamp = tuple[int, int, torch.Size]


class _Entry:
    """A weight inside a scope. It is held, so that its ``id`` is no other tensor's meanwhile."""

    __slots__ = ("name", "panels", "pin", "scopes", "stamp", "weight", "whole")

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.scopes = name, weight, 0
        self.forget()

    def forget(self) -> None:
        self.panels: dict[Layout, Tensor] = {}
        self.stamp: Stamp | None = None
        self.pin: Tensor | None = None  # keeps the address of `stamp` from being given to another tensor
        self.whole: Tensor | None = None  # RECMAS_CHECK=1 only


_entries: dict[int, _Entry] = {}
_lock = threading.Lock()


@contextmanager
def packed(*links: Packable | Iterable[Packable]) -> Iterator[None]:
    """Let the CPU kernels keep packed copies of these links' weights inside the block.

    A packed weight is read once, in order, at the speed of memory; without the scope each call lays its weights out
    anew. Inside the block nobody may write the weights other than by ``load_state_dict`` or by moving the module:
    these, and in-place operations of torch, are noticed; a write past autograd (``.data``, a fused optimiser, another
    process) is not. ``RECMAS_CHECK=1`` compares every weight in full at each use.

    Blocks nest, and several threads may be in them; the copies are made at the first use, and dropped at the end of the
    last block that names their weight. From three rows on, results are the same bits inside and outside; fewer read
    unpacked weights where they lie, which sums in another order. Weights on other devices are never copied.

    Args:
        links: modules (their parameters), weights, or iterables of them.

    Raises:
        TypeError: something else was given.
        RuntimeError: from a link, under ``RECMAS_CHECK=1``: a weight was written inside the block.
    """
    weights = list(_weights(links))
    with _lock:
        for name, weight in weights:
            _entries.setdefault(id(weight), _Entry(name, weight)).scopes += 1
    try:
        yield
    finally:
        with _lock:
            for _, weight in weights:
                entry = _entries[id(weight)]
                entry.scopes -= 1
                if entry.scopes == 0:
                    del _entries[id(weight)]


def _weights(links: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(links, nn.Module):
        yield from links.named_parameters()
    elif isinstance(links, Tensor):
        yield f"a weight {tuple(links.shape)}", links
    elif isinstance(links, Iterable) and not isinstance(links, str):
        for link in links:
            yield from _weights(link)
    else:
        raise TypeError(f"packed() was given a {type(links).__name__}, expected modules or tensors")


def in_scope() -> bool:
    """Whether any weight is inside a scope, so that `lookup` may find something."""
    return bool(_entries)


def lookup(weight: Tensor, layout: Layout, pack: Callable[[Tensor, Layout], Tensor]) -> Tensor | None:
    """The packed form of a contiguous CPU weight in ``layout``, made by ``pack``; None outside of its scopes."""
    entry = _entries.get(id(weight))
    if entry is None:
        return None
    if settings.checks():
        _expect_unwritten(entry)
    stamp = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.shape)
    if entry.stamp != stamp:
        entry.forget()
        entry.pin, entry.stamp = weight.detach(), stamp
        if settings.checks():
            entry.whole = _bytes(weight).clone()
    panels = entry.panels.get(layout)
    if panels is None:
        panels = entry.panels[layout] = pack(weight, layout)
    return panels


def _expect_unwritten(entry: _Entry) -> None:
    if entry.panels and entry.whole is None:  # packed before the variable was set
        entry.forget()
    if entry.whole is not None and not torch.equal(_bytes(entry.weight), entry.whole):
        raise RuntimeError(f"{entry.name} was written inside packed(), whose copies hold its former values")


def _bytes(weight: Tensor) -> Tensor:
    return weight.detach().view(torch.uint8)


def forget(weights: Iterable[Tensor]) -> None:
    """Drop the packed copies of ``weights``, if any; inside their scopes the next use makes new ones."""
    if not _entries:
        return
    for weight in weights:
        entry = _entries.get(id(weight))
        if entry is not None:
            entry.forget()


def packed_bytes() -> int:
    """Bytes that packed copies hold at present."""
    return sum(panels.nbytes for entry in list(_entries.values()) for panels in list(entry.panels.values()))
