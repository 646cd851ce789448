"""Layers that are put off, so that those of one position of a model run in one call of the kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recmas_kernels import decoder_kernels
from recmas_kernels.backends import cpu_decoder
from recmas_kernels.decoder_parts import Packed, Parts

_thread = threading.local()
_ORDER = "the model called its layers in another order than when it was looked at"


class _Layer(NamedTuple):
    parts: Parts
    packed: Packed
    turned: tuple[Tensor, Tensor]
    mask: Tensor | None
    room: tuple[Tensor, Tensor]


class Run:
    """One call of a model, on one thread.

    A layer that is put off returns the tensor that the result will be in, and the next one takes that for its rows: so
    nobody may look between them. It wants a cache with ``make_room(index, rows, dtype)``, which grows by a position
    that is still to be written and returns all keys and values; or None, and has not grown.

    Args:
        layers: in the order in which the model calls them, each of what the one before it returned.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._next = dict(pairwise(layers))
        self._waiting: dict[int, _Layer] = {}  # by index in the cache
        self._x = self._y = torch.empty(0, device="cpu")

    def follows(self, x: Any) -> bool:
        """Whether rows are what a layer that was put off returned, so that what was asked of them holds."""
        return x is self._y and bool(self._waiting)

    def has_fitted(self, parts: Parts, turned: Any, mask: Any) -> bool:
        """Whether the layer put off last was given the same, and has parts of the same sizes and dtype."""
        last = next(reversed(self._waiting.values()))
        return (
            last.turned is turned
            and last.mask is mask
            and last.parts.sizes == parts.sizes
            and last.parts.features == parts.features
            and last.parts.dtype is parts.dtype
        )

    def put_off(
        self,
        layer: nn.Module,
        parts: Parts,
        packed: Packed,
        x: Tensor,
        turned: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
    ) -> Tensor | None:
        """The tensor that will hold the result, or None if this layer cannot be put off."""
        self.expect(x)
        if seen(layer) or not hasattr(cache, "make_room"):
            return None
        if parts.index in self._waiting:
            self.complete()
        room = cache.make_room(parts.index, x.shape[0], x.dtype)
        if room is None:
            return None
        keys, values = room
        if not parts.reads(x, keys, values, mask):
            self.complete()
            return decoder_kernels.run_in_room(parts, packed, x, turned, mask, room)
        if not self._waiting:
            self._x, self._y = x, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._waiting[parts.index] = _Layer(parts, packed, turned, mask, room)
        following = self._next.get(layer)
        if following is None or seen(following):
            self.complete()
        return self._y

    def expect(self, x: Any) -> None:
        """Raise if layers are put off and another has rows that are not theirs: somebody read what is not there yet."""
        if self._waiting and x is not self._y:
            raise RuntimeError(_ORDER)

    def complete(self) -> None:
        """Run all that was put off. If this fails it is still to be run."""
        waiting = list(self._waiting.values())
        if waiting and not cpu_decoder.decoder_layers(self._x, self._y, [_arguments(*each) for each in waiting]):
            x = self._x
            for parts, packed, turned, mask, room in waiting:
                x = decoder_kernels.run_in_room(parts, packed, x, turned, mask, room)
            self._y.copy_(x)
        self._waiting = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """For what this thread does in the block. If that raises, caches hold what the layers before would have left.

        Raises:
            RuntimeError: at its end, layers are still put off.
        """
        before, _thread.run = current(), self
        try:
            yield
            if self._waiting:
                raise RuntimeError(_ORDER)
        finally:
            _thread.run = before
            self.complete()


def current() -> Run | None:
    """Of this thread."""
    return getattr(_thread, "run", None)


def complete(x: Any) -> None:
    """Before a layer reads the rows that the one before returned."""
    run = current()
    if run is not None:
        run.expect(x)
        run.complete()


def seen(layer: nn.Module) -> bool:
    """Whether somebody sees what goes into a layer and what comes out of it: hooks, or compiled code."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or layer._compiled_call_impl is not None


def _arguments(
    parts: Parts, packed: Packed, turned: tuple[Tensor, Tensor], mask: Tensor | None, room: tuple[Tensor, Tensor]
) -> tuple[Any, ...]:
    return (*parts.sizes, *parts.feed, parts.scale, *packed.inputs, *turned, *room, mask, *packed.output)
