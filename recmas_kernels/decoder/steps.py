"""Positions of one batch, one after the other: what does not change from one to the next is made once for many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recmas_kernels.backends import cpu, settings
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder.layer import suits
from recmas_kernels.decoder.model import ModelKernel, begins_with
from recmas_kernels.decoder.run import Ran, recorded
from recmas_kernels.rms_norm import NormKernel
from recmas_kernels.watch import CALLS, HOOKS, Watch, Watched, as_written, is_own, names_of

_AHEAD = 64
"""Positions whose cosines and sines are computed at once."""
_WORTH = 3
"""Positions to come for which they are foreseen, as that takes about as long as is won in two of them."""
_TRIES = 4
"""After so many in a row that served no position, the decoder is called for all that follow."""


class DecoderSteps:
    """The positions that a batch goes on by, on one cache.

    The first position is read by a call of the decoder. If that ran all layers at once, and gave them the rows, the
    mask and the turns that are expected here, the positions after it are read without the decoder's class: by one call
    of the layers' kernels, on turns made for many positions, and one of the norm's. Before each of them the decoder,
    what it computes turns with, its layers and its norm are compared with what they were, as by every call of the
    decoder; whatever has changed, hooks included, has the decoder called again. The bits are those of such calls.

    Args:
        model: a decoder.
        cache: what its calls append to. Taken here are those with ``lend(indices, rows, dtype)``: layers that grow
            together (`recmas.engine.growing_cache.Lent`), or None.
        mask: int64 ``[B, C]`` of all columns; what is not padding is 1.
        positions: int64 ``[B, C]``, the position of each.
    """

    def __init__(self, model: nn.Module, cache: Any, mask: Tensor, positions: Tensor) -> None:
        self._model, self._cache, self._mask, self._positions = model, cache, mask, positions
        self._run: _Run | None = None
        self._tries = _TRIES if hasattr(cache, "lend") else 0

    def __call__(self, embeds: Tensor, column: int, call: Callable[[], Tensor]) -> Tensor:
        """Final-norm hidden states ``[B, 1, d]`` of one more position.

        Args:
            embeds: ``[B, 1, d]``.
            column: that it is.
            call: calls the decoder for it, with the mask and positions up to there.
        """
        run, self._run = self._run, None  # whatever is raised
        hidden = None if run is None else run(embeds, column)
        if hidden is not None:
            self._run, self._tries = run, _TRIES
            return hidden
        worth = column + _WORTH < self._mask.shape[1] and isinstance(_kernel(self._model), ModelKernel)
        if self._tries == 0 or not worth:
            return call()
        with recorded() as ran:
            hidden = call()
        self._run = self._begun(ran, embeds, hidden, column)
        self._tries -= 1
        return hidden

    def _begun(self, ran: list[Ran], embeds: Tensor, hidden: Tensor, column: int) -> _Run | None:
        """The positions after this one, if they can be foreseen from it."""
        if len(ran) != 1 or ran[0].x is not embeds:
            return None
        (first,) = ran
        kept = first.known.kept()  # first: what changes from here on is seen
        if kept is None or [id(found.parts) for found in kept[1]] != [id(layer.parts) for layer in first.layers]:
            return None
        turned, mask = first.layers[0].turned, first.layers[0].mask
        if any(layer.turned is not turned or layer.mask is not mask for layer in first.layers):
            return None
        around = _Around.of(self._model)
        if around is None or around.dtype is not first.y.dtype or not around.unchanged(first.known.layers):
            return None
        if not torch.equal(hidden, around.normed(first.y)):
            return None
        turns = _Turns(around, embeds, self._positions, column)
        masks = None if bool(self._mask.all()) else self._mask.bool()[:, None, None]
        expected = None if masks is None else masks[..., : column + 1]
        if not turns.are(column, turned) or not _same(mask, expected):
            return None
        lent = self._cache.lend([layer.parts.index for layer in first.layers], embeds.shape[0], embeds.dtype)
        return None if lent is None or lent.end != column + 1 else _Run(first, kept, around, turns, masks, lent)


class _Run:
    """Positions that can be read by the kernels alone."""

    def __init__(self, first: Ran, kept: Any, around: _Around, turns: _Turns, masks: Tensor | None, lent: Any) -> None:
        self._known, self._kept = first.known, kept
        self._around, self._turns, self._masks, self._lent = around, turns, masks, lent
        self._shape, self._dtype = first.x.shape, first.x.dtype
        rooms = zip(first.layers, lent.rooms, strict=True)
        self._layers = decoder.DecoderLayers(first.x, [layer.arguments(0, room) for layer, room in rooms])
        self._vectors = [vector for layer in first.layers for vector in layer.packed.vectors]

    def __call__(self, x: Tensor, column: int) -> Tensor | None:
        """Hidden states ``[B, 1, d]``; None, and nothing done, where the decoder has to be called."""
        if not suits(x) or x.shape != self._shape or x.dtype is not self._dtype or settings.checks():
            return None
        if column != self._lent.end or column >= self._lent.columns:
            return None
        if not self._around.unchanged(self._known.layers) or self._known.kept() is not self._kept:
            return None
        if not self._lent.holds() or any(map(Tensor.is_neg, self._vectors)):  # all else of them the kernels see
            return None
        mask = None if self._masks is None else self._masks.narrow(3, 0, column + 1)
        y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        given = (*self._turns(column), mask)
        self._lent.end += 1  # first: whatever is raised, the position counts as read
        if not self._layers(x, y, given, column + 1, self._around.norm):
            self._lent.end -= 1
            return None
        return y


class _Turns:
    """Cosines and sines of the columns to come, each as the decoder computes them for that column alone.

    Args:
        around: has what computes them.
        x: rows of the decoder.
        positions: ``[B, C]``.
        column: the first one.
    """

    def __init__(self, around: _Around, x: Tensor, positions: Tensor, column: int) -> None:
        self._around, self._x, self._positions = around, x, positions
        self._fill(column)

    def __call__(self, column: int) -> tuple[Tensor, Tensor]:
        """``[B, 1, D]`` each."""
        if column >= self._first + len(self._cos):
            self._fill(column)
        return self._cos[column - self._first], self._sin[column - self._first]

    def are(self, column: int, turned: tuple[Tensor, Tensor]) -> bool:
        """Whether these are what the decoder's layers were given."""
        return all(torch.equal(*pair) for pair in zip(self(column), turned, strict=True))

    def _fill(self, column: int) -> None:
        positions = self._positions[:, column : column + _AHEAD]
        found = self._around.rotary(self._x, position_ids=positions)
        self._cos, self._sin = (angles.transpose(0, 1).unsqueeze(2).contiguous() for angles in found)
        self._first = column


class _Around:
    """What a decoder of a known class does before its layers and after them, and what that depends on.

    Attributes:
        rotary: computes turns.
        norm: gain, offset and eps.
        dtype: of the gain.
    """

    def __init__(self, model: nn.Module, rotary: nn.Module, norm: nn.Module, rule: tuple[float, float]) -> None:
        gain: Any = norm._parameters["weight"]
        self.rotary, self.norm, self.dtype = rotary, (gain, *rule), gain.dtype
        self._model = itself = weakref.ref(model)
        kind = type(model)
        entries: list[Any] = [itself, "forward", _kernel(model), itself, "_modules", model._modules]
        entries += [model._modules, "rotary_emb", rotary, model._modules, "norm", norm]
        sizes: list[Any] = []
        entries += [weakref.ref(norm), "forward", _kernel(norm)]
        for part in (model, rotary, norm):
            for name in HOOKS:
                hooks = part.__dict__[name]
                entries += [weakref.ref(part), name, hooks]
                sizes += [hooks, len(hooks)]
        for place, name in names_of(kind.forward):
            entries += [place, name, place[name]]
        classes = [item for name in (*CALLS, "forward") for item in (kind, name, getattr(kind, name))]
        self._watched = Watched.of_all([Watched(entries, sizes, (), classes), Watch(rotary), Watch(norm)])
        self._values = [(held, held.clone()) for held in rotary._buffers.values() if held is not None]

    @classmethod
    def of(cls, model: nn.Module) -> _Around | None:
        """None where positions to come cannot be foreseen."""
        rotary, norm = model._modules.get("rotary_emb"), model._modules.get("norm")
        if rotary is None or norm is None or any(_is_called(part) for part in (model, rotary, norm)):
            return None
        kind = type(model)
        if type(rotary).__module__ != kind.__module__ or not as_written(rotary) or rotary._modules:
            return None
        called = [value for place, name in names_of(kind.forward) if callable(value := place[name])]
        if not all(is_own(kind, function) for function in called):  # somebody may want to see every call
            return None
        kernel = _kernel(norm)
        if "forward" in rotary.__dict__ or not isinstance(kernel, NormKernel) or _slides(model) or not kernel.look():
            return None
        rule = getattr(rotary, "rope_type", None)
        if not isinstance(rule, str) or "dynamic" in rule or rule == "longrope":  # these go by the positions before
            return None
        found = kernel.computes
        return None if found is None else cls(model, rotary, norm, found)

    def unchanged(self, layers: Sequence[nn.Module]) -> bool:
        """Whether all of it is as it was, and these are the decoder's first layers."""
        model = self._model()
        if model is None or not begins_with(model, layers):
            return False
        gain, _, _ = self.norm  # its data may have been replaced
        if gain.dtype is not self.dtype or not (gain.is_cpu and gain.is_contiguous()) or gain.is_neg():
            return False
        same = all(held.dtype is was.dtype and torch.equal(held, was) for held, was in self._values)
        return same and self._watched.unchanged()

    def normed(self, x: Tensor) -> Tensor:
        """What the decoder's norm makes of what its last layer returned, while nothing has changed."""
        return cpu.rms_norm(x, *self.norm)


def _kernel(module: nn.Module) -> Any:
    return module.__dict__.get("forward")


def _is_called(part: nn.Module) -> bool:
    """Whether calling a part is more than its ``forward``."""
    return part._compiled_call_impl is not None or any(part.__dict__[name] for name in HOOKS)


def _slides(model: nn.Module) -> bool:
    """Whether some layers attend to the latest positions only."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is not None
    return bool(set(kinds) - {"full_attention"})


def _same(mask: Tensor | None, expected: Tensor | None) -> bool:
    if mask is None or expected is None:
        return mask is expected
    return torch.equal(mask, expected)
