"""Decoder layers of any model, one position at a time, in two kernels instead of some thirty operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recmas_kernels.backends import cpu_decoder
from recmas_kernels.backends.choice import requested
from recmas_kernels.decoder_parts import Parts, parts_of
from recmas_kernels.decoder_proof import Proofs
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.frozen_linear import OF_PACKING
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
        self._parts: Parts | None = None
        self._watch: Watch | None = None

    def look(self) -> bool:
        parts = parts_of(self.module)
        if parts is None:  # looked at again at every call; that is cheap
            self._parts = self._watch = None
            return False
        watch = Watch(self.module, OF_PACKING)  # `Parts.packed` looks at these
        proved = self._proofs.hold(self.module, parts, served)
        self._parts = parts if proved else None  # first, for threads that find the layer unchanged meanwhile
        self._watch = watch
        return proved

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
        if self._watch is None or not self._watch.unchanged():
            self.look()
        parts = self._parts
        if parts is None or requested() not in ("auto", "cpu") or autocast_enabled("cpu") or _has_any_global_hook():
            return None
        if not parts.fits(x, given.get("position_embeddings"), given.get("attention_mask")):
            return None
        cache = given.get("past_key_values")
        return None if cache is None else served(parts, x, given["position_embeddings"], given["attention_mask"], cache)


def served(parts: Parts, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor | None:
    """What the layer makes of ``x [B, 1, d]``; None, before anything is done, if a weight is packed no more."""
    packed = parts.packed()
    if packed is None:
        return None
    queries, keys, values = cpu_decoder.layer_inputs(parts.sizes, parts.scale, x, packed.inputs, *turned)
    keys, values = cache.update(keys, values, parts.index)
    sizes = (*parts.sizes, parts.hidden_features, parts.activation)
    return cpu_decoder.layer_output(sizes, x, queries, keys, values, mask, packed.output)
