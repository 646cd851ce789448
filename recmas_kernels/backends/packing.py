"""Packed CPU weights: a weight's copy in the layout the kernels stream, kept as long as the weight stays what it was.

Rollouts call the same link thousands of times, so its weights are packed once, at their second use. A stale copy would
give wrong results silently, so an entry holds only while all of this does:

- the Parameter object is alive (a weakref's callback deletes the entry with it),
- its ``_version``, address, shape and layout are those of packing time; the entry holds ``weight.detach()``, so that
  the address cannot be given to another tensor meanwhile,
- 64 sampled words of its memory are those of packing time: fused optimisers, ``.data`` writes and broadcasts bump no
  version. ``RECMAS_CHECK=1`` compares the whole weight instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from recmas_kernels.backends import settings

SAMPLED_WORDS = 64  # as csrc/link.h says

Layout = tuple[torch.dtype, int]  # compute dtype, instruction set
Stamp = tuple[int, int, torch.Size, Layout]


class _Entry:
    __slots__ = ("packed", "pin", "samples", "stamp", "watch", "whole")

    def __init__(self, weight: Tensor, stamp: Stamp, watch: weakref.ref[Tensor]) -> None:
        self.watch = watch
        self.stamp = stamp
        self.pin = weight.detach()
        self.packed: Tensor | None = None
        self.samples: Tensor | None = None
        self.whole: Tensor | None = None  # RECMAS_CHECK=1 only


_entries: dict[int, _Entry] = {}


def _unchanged(native: ModuleType, weight: Tensor, entry: _Entry) -> bool:
    if settings.checks():  # an entry from before the variable was set holds no whole copy, and is made again
        return entry.whole is not None and torch.equal(weight.detach().view(torch.uint8), entry.whole)
    return native.words_match(weight, weight.nbytes, entry.samples)


def packable(weight: Tensor) -> bool:
    """Whether copies of ``weight`` may be kept: a contiguous Parameter that is not an inference tensor."""
    return isinstance(weight, Parameter) and weight.is_contiguous() and not weight.is_inference()


def lookup(
    native: ModuleType, weight: Tensor, layout: Layout, pack: Callable[[Tensor, Layout], Tensor]
) -> Tensor | None:
    """The packed form of a `packable` CPU weight in ``layout``, or None at its first use.

    ``pack(weight, layout)`` makes it; ``native`` is the compiled module, which samples and compares memory.
    """
    key = id(weight)
    entry = _entries.get(key)
    stamp = (weight._version, weight.data_ptr(), weight.shape, layout)
    if entry is not None and entry.watch() is weight and entry.stamp == stamp:
        if entry.packed is None:
            _fill(native, weight, entry, pack)
            return entry.packed
        if _unchanged(native, weight, entry):
            return entry.packed
    _entries[key] = _Entry(weight, stamp, weakref.ref(weight, lambda watch: _expire(key, watch)))
    return None


def _fill(native: ModuleType, weight: Tensor, entry: _Entry, pack: Callable[[Tensor, Layout], Tensor]) -> None:
    samples = torch.empty(SAMPLED_WORDS, dtype=torch.int64)
    native.sample_words(weight, samples)
    entry.samples = samples
    if settings.checks():
        entry.whole = weight.detach().view(torch.uint8).clone()
    entry.packed = pack(weight, entry.stamp[3])


def _expire(key: int, watch: weakref.ref[Tensor]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.watch is watch:  # the id may already belong to a newer weight
        del _entries[key]


def forget(weights: Iterable[Tensor]) -> None:
    """Drop the packed copies of ``weights``, if any."""
    for weight in weights:
        _entries.pop(id(weight), None)


def clear_packed() -> None:
    """Drop every packed copy of every weight; the next calls read the weights themselves and pack again.

    Call it after writing *part* of a weight past autograd, through ``.data`` or numpy: such a write bumps no version,
    and one that changes a few rows can miss the sampled words. Optimisers, ``load_state_dict`` and in-place ops need
    no call.
    """
    _entries.clear()


def packed_bytes() -> int:
    """Bytes that packed copies hold at present."""
    return sum(entry.packed.nbytes for entry in list(_entries.values()) if entry.packed is not None)
