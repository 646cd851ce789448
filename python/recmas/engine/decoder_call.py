"""How a decoder body is called, whatever its forward calls its arguments."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.engine.abilities import missing

CACHE_NAMES = ("past_key_values", "cache_params")
"""What forwards call the cache; one that has neither takes none."""


class DecoderCall:
    """Calls one decoder with the arguments that it takes, and that change nothing where they say nothing new.

    Args:
        decoder: body of a transformers model.
        mask: pass masks; None where the decoder has proved that a mask of ones says nothing.
        positions: pass positions; None likewise.
        copies: pass a copy of the embeddings; None where the decoder has not proved that it leaves them alone.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        mask: bool | None = None,
        positions: bool | None = None,
        copies: bool | None = None,
    ) -> None:
        takes = accepted(decoder)
        self.decoder = decoder
        self._copies = bool(missing(decoder, "intact inputs")) if copies is None else copies
        self._mask = "attention_mask" in takes and (not missing(decoder, "masks") if mask is None else mask)
        self._positions = "position_ids" in takes and (
            not missing(decoder, "positions") if positions is None else positions
        )
        self._use_cache = "use_cache" in takes
        self._cache = next((name for name in CACHE_NAMES if name in takes), None)

    def __call__(self, embeds: Tensor, mask: Any, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Final-norm hidden states ``[B, S, d]`` of input embeddings ``[B, S, d]``.

        Args:
            embeds: appended to what `cache` holds.
            mask: int64 ``[B, T]``, T columns in all, or what else the model takes for it.
            positions: int64 ``[B, S]``.
            cache: read and appended to; None computes everything anew.
        """
        given: dict[str, Any] = {}
        if self._mask:
            given["attention_mask"] = mask
        if self._positions:
            given["position_ids"] = positions
        if self._use_cache:
            given["use_cache"] = cache is not None
        if cache is not None:
            if self._cache is None:
                raise ValueError("its forward takes no cache")
            given[self._cache] = cache
            if self._mask and isinstance(mask, Tensor) and not any(hasattr(layer, "keys") for layer in cache.layers):
                given["attention_mask"] = mask[:, -embeds.shape[1] :]  # nothing attends: the mask is of what is fed
        if self._copies:
            embeds = embeds.clone()
        states: Tensor = self.decoder(inputs_embeds=embeds, **given).last_hidden_state
        return states


def accepted(decoder: Any) -> frozenset[str]:
    """Names of the arguments that a decoder's forward takes; what vanishes in ``**kwargs`` is not among them."""
    kind: Any = type(decoder)
    return _accepted(kind)


@functools.cache
def _accepted(kind: Any) -> frozenset[str]:
    named = inspect.signature(kind.forward).parameters.values()
    return frozenset(parameter.name for parameter in named if parameter.kind != parameter.VAR_KEYWORD)
