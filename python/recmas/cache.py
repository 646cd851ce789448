"""What a model keeps of its past, and how a prompt is continued on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class Continuation:
    """A batch of left-padded sequences that grows on one cache; rollout and decoding both run on it.

    The cache holds what the decoder needs of its past: keys and values, sliding windows or recurrent states, by its
    configuration. Positions come from the mask, so left padding counts nothing; the two-dimensional mask is passed on,
    which also keeps padding out of recurrent states.

    Args:
        decoder: decoder body of a transformers model (no LM head).
        mask: int64 ``[B, T]`` of the prompt.
        room: positions that will likely be fed after the prompt; more find room when they come.
        context: positions the model has; rows that go on beyond it, as ended ones beside others do, stay at the last.
    """

    def __init__(self, decoder: PreTrainedModel, mask: Tensor, room: int, context: int | None = None) -> None:
        self._decoder, self._last = decoder, None if context is None else context - 1
        self._cache = _new_cache(decoder)
        self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], room)], dim=1)
        self._positions = positions_of(self._mask, self._last)
        self._length = 0

    def feed(self, embeds: Tensor) -> Tensor:
        """Append ``[B, S, d]`` input embeddings; the final-norm hidden state ``[B, d]`` at the last one."""
        start, self._length = self._length, self._length + embeds.shape[1]
        if self._length > self._mask.shape[1]:
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], self._length)], dim=1)
            self._positions = positions_of(self._mask, self._last)
        output = self._decoder(
            inputs_embeds=embeds,
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions[:, start : self._length],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]


def positions_of(mask: Tensor, last: int | None = None) -> Tensor:
    """Position ids int64 ``[B, T]``: the number of unmasked inputs before each one, `last` at most."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0, max=last)


def _new_cache(decoder: PreTrainedModel) -> DynamicCache:
    """The cache this decoder needs; without gradients its full-attention layers grow in place."""
    cache = DynamicCache(config=decoder.config)
    if not torch.is_grad_enabled():
        cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow; transformers' own layer copies all of them at every step.

    For the CPU rollout of 32 steps on a prompt of 300 (8 layers, d=512, 4 rows) that copying was a fifth of the time.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, S, d]``; views of all that is held, ``[B, heads, T, d]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states[:, :, :0] for states in (key_states, value_states)]
            self.keys, self.values = self._buffers
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [_grown(held, end + max(end // 2, 64)) for held in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def _grown(held: Tensor, capacity: int) -> Tensor:
    """A buffer of `capacity` positions that begins with what is held."""
    batch, heads, length, width = held.shape
    buffer = held.new_empty(batch, heads, capacity, width)
    buffer[:, :, :length] = held
    return buffer
