"""One call of a decoder in which its layers are put off until the last of them: then all run in one call of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recmas_kernels.backends import settings
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import kernels
from recmas_kernels.decoder.layer import Found, LayerKernel, suits, takes
from recmas_kernels.decoder.parts import Packed, Parts
from recmas_kernels.watch import Watched

_ORDER = "the model called its layers in another order than when it was looked at"


class Known:
    """What is known of a decoder: its layers, and what they compute for as long as nothing of them changes.

    Args:
        layers: in the order in which the model calls them, each of what the one before it returned.
        watched: what says so, and that they are called by their kernels alone.
    """

    def __init__(self, layers: Sequence[nn.Module], watched: Watched) -> None:
        self.layers, self.watched = layers, watched
        self._found: tuple[Watched, list[Found]] | None = None

    def kept(self) -> tuple[Watched, list[Found]] | None:
        """What the layers are now, another tuple when they have changed; None if one is to be called itself."""
        kept = self._found  # another thread may look meanwhile
        if kept is None or not kept[0].unchanged():
            kept = self._found = self._look()
        return kept

    def found(self) -> list[tuple[Parts, Packed]] | None:
        """What the kernels compute for each layer; None if one is to be called itself."""
        kept = self.kept()
        readable = [] if kept is None else [found.readable() for found in kept[1]]
        found = [each for each in readable if each is not None]
        return found if kept is not None and len(found) == len(self.layers) else None

    def _look(self) -> tuple[Watched, list[Found]] | None:
        kernels = [layer.__dict__.get("forward") for layer in self.layers]
        kept = [kernel.kept() if isinstance(kernel, LayerKernel) else None for kernel in kernels]
        known = [each for each in kept if each is not None]
        watched = Watched.of_all([self.watched, *(watch for watch, _ in known)])
        return (watched, [found for _, found in known]) if len(known) == len(kept) and watched.unchanged() else None


class Ran(NamedTuple):
    """One position whose layers ran in one call: what they were given, and what the last of them returned."""

    known: Known
    x: Tensor
    y: Tensor
    layers: list[Given]


_RAN: ContextVar[list[Ran] | None] = ContextVar("ran", default=None)


@contextmanager
def recorded() -> Iterator[list[Ran]]:
    """The positions that this thread runs in the block, as they are run."""
    found: list[Ran] = []
    token = _RAN.set(found)
    try:
        yield found
    finally:
        _RAN.reset(token)


class Together:
    """What one call of a decoder, on one thread, makes of its layers.

    Each layer that is called returns the same tensor, without values, and the next one is given that: so nobody may
    look between them. When the last one is called all of them run; what it returns is the result.

    They run in one call of the kernels where nothing of them has changed, the kernels can read what they were given,
    and the cache has ``make_room(indices, rows, dtype)``, which grows those layers by a position that is still to be
    written and returns all keys and values of each; or None, and has not grown. Otherwise each is called as the model
    called it, one after the other.

    Args:
        known: of the model.

    Attributes:
        stand_ins: what the model calls instead of each layer.
    """

    def __init__(self, known: Known) -> None:
        self._known, self._layers = known, known.layers
        self._calls: list[_Call] = []
        self._between = torch.empty(0, device="cpu")
        self.stand_ins = tuple(_StandIn(self, layer) for layer in known.layers)

    @contextmanager
    def open(self) -> Iterator[None]:
        """For the model's call. If that raises, caches hold what the layers called before would have left.

        Raises:
            RuntimeError: some layers were called, and others not.
        """
        try:
            yield
            if self._calls:
                raise RuntimeError(_ORDER)
        finally:
            self._one_by_one()

    def call(self, layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """A layer, as the model calls it."""
        x = args[0] if args else given.get("hidden_states")
        if not self._calls and isinstance(x, Tensor):
            self._between = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        elif x is not self._between:
            raise RuntimeError(_ORDER)
        if layer is not self._layers[len(self._calls)]:
            raise RuntimeError(_ORDER)
        self._calls.append(_Call(args, given))
        if len(self._calls) < len(self._layers):
            return self._between
        y = self._at_once()
        return self._one_by_one() if y is None else y

    def _one_by_one(self) -> Any:
        """What the layers that were called return; if one raises, those after it are not run."""
        calls, self._calls = self._calls, []
        x: Any = None
        for index, (layer, (args, given)) in enumerate(zip(self._layers, calls, strict=False)):
            if index and args:
                args = (x, *args[1:])
            elif index:
                given = {**given, "hidden_states": x}
            x = layer(*args, **given)
        return x

    def _at_once(self) -> Tensor | None:
        args, given = self._calls[0]
        x: Any = args[0] if args else None
        cache: Any = given.get("past_key_values")
        if not suits(x) or not hasattr(cache, "make_room") or settings.checks():
            return None
        layers = self._found(x, cache)
        indices = () if layers is None else tuple(layer.parts.index for layer in layers)
        if layers is None or len(set(indices)) < len(indices):
            return None
        calls, self._calls = self._calls, []  # whatever is raised: a layer that has grown must not grow once more
        rooms = cache.make_room(indices, x.shape[0], x.dtype)
        if rooms is None:
            self._calls = calls
            return None
        if not _ran(x, self._between, layers, rooms):
            return _apart(x, layers, rooms)
        if (record := _RAN.get()) is not None:
            record.append(Ran(self._known, x, self._between, layers))
        return self._between

    def _found(self, x: Tensor, cache: Any) -> list[Given] | None:
        """What each layer computes, if the kernels do the same with what it was given."""
        known = self._known.found()
        if known is None:
            return None
        found: list[Given] = []
        for (parts, packed), (args, given) in zip(known, self._calls, strict=True):
            if len(args) != 1 or given.get("past_key_values") is not cache or not takes(given):
                return None
            layer = Given(parts, packed, given.get("position_embeddings"), given.get("attention_mask"))
            if not (found and layer.is_like(found[-1])) and not parts.fits(x, layer.turned, layer.mask):
                return None
            found.append(layer)
        return found


class _StandIn:
    """What a model finds in a layer's place: its call is put off, all else is the layer's."""

    __slots__ = ("_layer", "_together")

    def __init__(self, together: Together, layer: nn.Module) -> None:
        self._together, self._layer = together, layer

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self._together.call(self._layer, args, given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Call(NamedTuple):
    args: tuple[Any, ...]
    given: dict[str, Any]


class Given(NamedTuple):
    """A layer and what it was given."""

    parts: Parts
    packed: Packed
    turned: Any
    mask: Any

    def is_like(self, other: Given) -> bool:
        """Whether another was given the same, and has parts of the same sizes and dtype."""
        mine, its = self.parts, other.parts
        given = self.turned is other.turned and self.mask is other.mask
        return given and mine.sizes == its.sizes and mine.features == its.features and mine.dtype is its.dtype

    def arguments(self, number: int, room: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        """One of `decoder.DecoderLayers`.

        Args:
            number: of what it is given.
            room: keys and values.
        """
        parts, packed = self.parts, self.packed
        return (*parts.sizes, *parts.feed, parts.scale, *packed.inputs, number, *room, *packed.output)


def _ran(x: Tensor, y: Tensor, layers: list[Given], rooms: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Layers after each other, into ``y``; False, and nothing done, if the kernels cannot read all of the cache."""
    if not all(layer.parts.reads(x, *room, layer.mask) for layer, room in zip(layers, rooms, strict=True)):
        return False
    numbers: dict[tuple[int, int], int] = {}
    given: list[Any] = []
    arguments = []
    for layer, room in zip(layers, rooms, strict=True):
        number = numbers.setdefault((id(layer.turned), id(layer.mask)), len(numbers))
        if len(given) < 3 * len(numbers):
            given += *layer.turned, layer.mask
        arguments.append(layer.arguments(number, room))
    return decoder.DecoderLayers(x, arguments)(x, y, tuple(given))


def _apart(x: Tensor, layers: list[Given], rooms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What the last of the layers returns, each in two calls."""
    for (parts, packed, turned, mask), room in zip(layers, rooms, strict=True):
        x = kernels.run_in_room(parts, packed, x, turned, mask, room)
    return x
