"""Models that look up a second embedding of every token, one for each layer (Gemma 3n, Gemma 4), run from embeddings.

The engine carries embeddings, so tokens are recognised by them: a row of the input that is a row of the table, bit for
bit, is that token. Any other row, a latent, has none; it gets what these models give the soft tokens of their images
and sounds, the padding token's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_CHUNK = 8192
_KEY_BYTES = 8


class PerLayerInputs:
    """Recognises the tokens of one decoder, and looks up what its layers are given for them.

    Args:
        decoder: has `get_per_layer_inputs`.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder, self._embedding = decoder, decoder.get_input_embeddings()
        self._padding = decoder.config.pad_token_id or 0
        weight = self._embedding.weight
        numbers = torch.arange(weight.shape[0], device=weight.device)
        with torch.no_grad():
            keys = torch.cat([_keys(self._embedding(some)) for some in numbers.split(_CHUNK)])
        self._keys, self._tokens = keys.sort(stable=True)

    def __call__(self, embeds: Tensor) -> Tensor:
        """``[B, S, L, p]`` for input embeddings ``[B, S, d]``."""
        with torch.no_grad():
            place = torch.searchsorted(self._keys, _keys(embeds)).clamp_(max=len(self._keys) - 1)
            tokens = self._tokens[place]
            known = (self._embedding(tokens) == embeds).all(dim=-1)
            found: Tensor = self._decoder.get_per_layer_inputs(torch.where(known, tokens, self._padding))
        return found

    @staticmethod
    def of(decoder: PreTrainedModel) -> PerLayerInputs | None:
        """For a decoder that takes them, made once for as long as its weights stay; None for any other."""
        if not getattr(decoder.config, "hidden_size_per_layer_input", 0):
            return None
        if not hasattr(decoder, "get_per_layer_inputs"):
            return None
        weight = decoder.get_input_embeddings().weight
        where = (weight.data_ptr(), weight.device, weight.dtype)
        held = vars(decoder).get("_recmas_per_layer_inputs")
        if held is None or held[0] != where:
            held = vars(decoder)["_recmas_per_layer_inputs"] = where, PerLayerInputs(decoder)
        found: PerLayerInputs = held[1]
        return found


def _keys(embeds: Tensor) -> Tensor:
    """int64 ``[...]`` of embeddings ``[..., d]``: the bits of their first numbers, which tell tokens apart."""
    first = embeds[..., : _KEY_BYTES // embeds.element_size()].contiguous()
    return first.view(torch.int64)[..., 0]
