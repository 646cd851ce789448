"""Decoder layers of known models, one position at a time, in two kernels instead of some thirty operators."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recmas_kernels import frozen
from recmas_kernels.backends import settings
from recmas_kernels.backends.choice import requested
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import kernels
from recmas_kernels.decoder.parts import Packed, Parts, is_known, is_plain, packed_of, parts_of
from recmas_kernels.decoder.proof import Proofs
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.observed import observed
from recmas_kernels.own_forward import OwnForward
from recmas_kernels.replaced import functions_replaced
from recmas_kernels.watch import Watch, as_written

_TAKEN = {"attention_mask", "position_embeddings", "past_key_values", "position_ids", "use_cache"}
_LOOKS = 8
"""After so many the layer changes all the time: it runs as its class says from then on. A look takes milliseconds."""


class LayerKernel(OwnForward):
    """The ``forward`` of one recognised layer: two kernels for one position of up to 16 rows without gradients.

    The layer's cache is updated between them by its own ``update``, so any cache will do. A layer that was changed
    since, in any part, attribute or hook, is looked at again. Whatever else is called runs as the layer's class says.

    Args:
        layer: a decoder layer of a model.
        proofs: of layers like it, for the first look.
    """

    def __init__(self, layer: nn.Module, proofs: Proofs) -> None:
        super().__init__(layer)
        self._proofs: Proofs | None = proofs
        self._looks = _LOOKS
        self._watch: Watch | None = None
        self._found: Found | None = None

    def look(self) -> bool:
        proofs = self._proofs or Proofs()  # what changed may be what the first ones do not know of
        self._proofs, self._watch, self._found = None, None, None
        self._looks -= 1
        layer = self.module
        watch = Watch(layer) if is_known(layer) else None  # first: what changes from here on is seen
        parts = None if watch is None or not as_written(layer) else parts_of(layer)
        if parts is not None and proofs.hold(layer, parts, kernels.run):
            self._found = Found(parts)  # before the watch, for threads that find the layer unchanged meanwhile
        self._watch = watch
        return self._found is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = None
        if len(args) == 1 and not torch.compiler.is_compiling() and suits(args[0]) and takes(kwargs):
            y = self._served(args[0], kwargs)
        layer = self.module
        return type(layer).forward(layer, *args, **kwargs) if y is None else y

    def _served(self, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        kept = self.kept()
        found = None if kept is None else kept[1].readable()
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        turned: Any = given.get("position_embeddings")
        if found is None or cache is None or not found[0].fits(x, turned, mask):
            return None
        parts, packed = found
        if settings.checks():
            for linear in parts.linears.values():
                frozen.expect_unwritten(linear._parameters["weight"])  # type: ignore[arg-type]
        return kernels.run(parts, packed, x, turned, mask, cache)

    def kept(self) -> tuple[Watch, Found] | None:
        """What the layer is now, and the kernels that it runs as; None if it runs as its class says."""
        if self._looks <= 0:
            return None
        watch = self._watch  # another thread may look meanwhile
        if watch is None or not watch.unchanged():
            self.look()
            watch = self._watch
        found = self._found
        return None if watch is None or found is None else (watch, found)


def suits(x: Any) -> bool:
    """Whether kernels may run here and now, on one position of few rows."""
    if not is_plain(x) or x.dim() != 3 or x.shape[1] != 1 or not 0 < x.shape[0] <= decoder.MOST_ROWS:
        return False
    if torch.is_grad_enabled() or observed() or functions_replaced():
        return False
    if autocast_enabled("cpu") or _has_any_global_hook():
        return False
    return requested() in ("auto", "cpu")


def takes(given: dict[str, Any]) -> bool:
    """Whether the kernels heed all that a layer was given by name."""
    return given.keys() <= _TAKEN or all(given[name] is None for name in given.keys() - _TAKEN)


class Found:
    """What a layer was found to be. Its weights are let go as soon as one of its linear layers lets go of them."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        panels = {name: linear.panels for name, linear in parts.linears.items() if linear.panels is not None}
        self.packed: Packed | None = packed_of(parts, parts.tensors(), panels)
        itself = weakref.ref(self)

        def forget(_: Any) -> None:
            if (found := itself()) is not None:
                found.packed = None

        self._panels = [weakref.ref(held, forget) for held in panels.values()]

    def readable(self) -> tuple[Parts, Packed] | None:
        """What the kernels compute with, if they can read it as it lies in memory now."""
        packed = self.packed
        return None if packed is None or not packed.readable(self.parts.dtype) else (self.parts, packed)
