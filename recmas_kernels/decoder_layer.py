"""Decoder layers of known models, one position at a time, in two kernels instead of some thirty operators."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recmas_kernels import frozen
from recmas_kernels.backends import cpu_decoder, settings
from recmas_kernels.backends.choice import requested
from recmas_kernels.decoder_parts import PLAIN_ACTIVATIONS, Packed, Parts, is_known, is_plain, packed_of, parts_of
from recmas_kernels.decoder_proof import Proofs
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.observed import observed
from recmas_kernels.own_forward import OwnForward
from recmas_kernels.watch import Watch

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
        self._found: _Found | None = None

    def look(self) -> bool:
        proofs = self._proofs or Proofs()  # what changed may be what the first ones do not know of
        self._proofs, self._watch, self._found = None, None, None
        self._looks -= 1
        layer = self.module
        watch = Watch(layer) if is_known(layer) else None  # first: what changes from here on is seen
        parts = parts_of(layer)
        if parts is not None and proofs.hold(layer, parts, served):
            self._found = _Found(parts)  # before the watch, for threads that find the layer unchanged meanwhile
        self._watch = watch
        return self._found is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not torch.compiler.is_compiling():
            y = self._served(args[0], kwargs)
            if y is not None:
                return y
        layer = self.module
        return type(layer).forward(layer, *args, **kwargs)

    def _served(self, x: Any, given: dict[str, Any]) -> Tensor | None:
        if not is_plain(x) or x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled() or observed():
            return None
        if not 0 < x.shape[0] <= cpu_decoder.MOST_ROWS or self._looks <= 0:
            return None
        if given.keys() - _TAKEN and any(given[name] is not None for name in given.keys() - _TAKEN):
            return None
        if requested() not in ("auto", "cpu") or autocast_enabled("cpu") or _has_any_global_hook():
            return None
        if self._watch is None or not self._watch.unchanged():
            self.look()
        found = self._found
        packed = None if found is None else found.packed
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        turned = given.get("position_embeddings")
        if found is None or packed is None or cache is None or turned is None:
            return None
        if not (packed.readable(found.parts.dtype) and found.parts.fits(x, turned, mask)):
            return None
        if settings.checks():
            for linear in found.parts.linears.values():
                frozen.expect_unwritten(linear._parameters["weight"])  # type: ignore[arg-type]
        return served(found.parts, packed, x, turned, mask, cache)


class _Found:
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


def served(
    parts: Parts, packed: Packed, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
) -> Tensor:
    """What a layer makes of ``x [B, 1, d]``; its cache has grown by one position."""
    queries, keys, values = cpu_decoder.layer_inputs(parts.sizes, parts.scale, x, packed.inputs, *turned)
    keys, values = cache.update(keys, values, parts.index)
    if parts.reads(x, keys, values, mask):
        return cpu_decoder.layer_output(parts.sizes + parts.feed, x, queries, keys, values, mask, packed.output)
    return _plain_output(parts, x, queries, keys, values, mask)


def _plain_output(parts: Parts, x: Tensor, queries: Tensor, keys: Any, values: Any, mask: Tensor | None) -> Tensor:
    """`cpu_decoder.layer_output` in plain torch, for what a cache returns that the kernels cannot read."""
    _, _, _, out, gate, up, down = parts.linears.values()
    after, before, last = (nn.Identity() if named is None else named[1] for named in parts.norms[3:])
    activation = PLAIN_ACTIVATIONS[cpu_decoder.ACTIVATIONS[parts.feed[1]]]
    attended = F.scaled_dot_product_attention(
        queries[:, :, None].to(x.dtype), keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
    x = x + after(out(attended.transpose(1, 2).flatten(2)))
    rows = before(x)
    return x + last(down(activation(gate(rows)) * up(rows)))
