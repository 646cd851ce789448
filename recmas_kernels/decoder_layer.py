"""Decoder layers of any model, one position at a time, in two kernels instead of some thirty operators."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recmas_kernels.backends import cpu_decoder
from recmas_kernels.backends.choice import requested
from recmas_kernels.decoder_parts import Packed, Parts, parts_of
from recmas_kernels.decoder_proof import Proofs
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.observed import observed
from recmas_kernels.own_forward import OwnForward
from recmas_kernels.watch import Watch

_TAKEN = {"attention_mask", "position_embeddings", "past_key_values", "position_ids", "use_cache"}


class LayerKernel(OwnForward):
    """The ``forward`` of one recognised layer: two kernels for one position of up to 16 rows without gradients.

    The layer's cache is updated between them by its own ``update``, so any cache will do. A layer that was changed
    since, in any part, attribute or hook, is looked at again. Whatever else is called runs as the layer's class says.

    Args:
        layer: a decoder layer of a model.
        proofs: of layers like it.
    """

    def __init__(self, layer: nn.Module, proofs: Proofs) -> None:
        super().__init__(layer)
        self._proofs = proofs
        self._found: _Found | None = None

    def look(self) -> bool:
        self._found = None
        parts = parts_of(self.module)
        if parts is None or not self._proofs.hold(self.module, parts, Packed.of(parts), served):
            return False
        self._found = _Found(self.module, parts)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not torch.compiler.is_compiling():
            y = self._served(args[0], kwargs)
            if y is not None:
                return y
        return type(self.module).forward(self.module, *args, **kwargs)

    def _served(self, x: Any, given: dict[str, Any]) -> Tensor | None:
        if type(x) is not Tensor or not x.is_cpu or x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled():
            return None
        if not 0 < x.shape[0] <= cpu_decoder.MOST_ROWS or x.is_neg() or x._is_zerotensor() or observed():
            return None
        if given.keys() - _TAKEN and any(given[name] is not None for name in given.keys() - _TAKEN):
            return None
        if requested() not in ("auto", "cpu") or autocast_enabled("cpu") or _has_any_global_hook():
            return None
        found = self._found
        packed = found.packed if found is not None and found.watch.unchanged() else None
        if packed is None:
            self.look()
            found = self._found
            packed = None if found is None else found.packed
        cache, turned, mask = (
            given.get("past_key_values"),
            given.get("position_embeddings"),
            given.get("attention_mask"),
        )
        if found is None or packed is None or cache is None or turned is None:
            return None
        if not found.parts.fits(x, turned, mask):
            return None
        return served(found.parts, packed, x, turned, mask, cache)


class _Found:
    """What a layer was found to be. Its weights are let go as soon as one of its linear layers lets go of them."""

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        self.parts, self.watch = parts, Watch(layer)
        self.packed: Packed | None = Packed.of(parts)
        itself = weakref.ref(self)

        def forget(_: Any) -> None:
            if (found := itself()) is not None:
                found.packed = None

        self._panels = [weakref.ref(linear.panels, forget) for linear in parts.linears]


def served(
    parts: Parts, packed: Packed, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
) -> Tensor:
    """What a layer makes of ``x [B, 1, d]``; its cache has grown by one position."""
    queries, keys, values = cpu_decoder.layer_inputs(parts.sizes, parts.scale, x, packed.inputs, *turned)
    keys, values = cache.update(keys, values, parts.index)
    return cpu_decoder.layer_output(parts.sizes + parts.feed, x, queries, keys, values, mask, packed.output)
