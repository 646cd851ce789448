"""What a model keeps of its past, and how a prompt is continued on it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Continuation:
    """A batch of left-padded sequences that grows on one cache; rollout and decoding both run on it.

    The cache holds what the decoder needs of its past: keys and values, sliding windows or recurrent states, by its
    configuration. Positions come from the mask, so left padding counts nothing; the two-dimensional mask is passed on,
    which also keeps padding out of recurrent states.

    Args:
        decoder: decoder body of a transformers model (no LM head).
        mask: int64 ``[B, T]`` of the prompt.
        room: positions that may be fed after the prompt.
    """

    def __init__(self, decoder: PreTrainedModel, mask: Tensor, room: int) -> None:
        self._decoder = decoder
        self._cache = DynamicCache(config=decoder.config)
        self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], room)], dim=1)
        self._positions = positions_of(self._mask)
        self._length = 0

    def feed(self, embeds: Tensor) -> Tensor:
        """Append ``[B, S, d]`` input embeddings; the final-norm hidden state ``[B, d]`` at the last one."""
        start, self._length = self._length, self._length + embeds.shape[1]
        output = self._decoder(
            inputs_embeds=embeds,
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions[:, start : self._length],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]


def positions_of(mask: Tensor) -> Tensor:
    """Position ids int64 ``[B, T]``: the number of unmasked inputs before each one."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0)
