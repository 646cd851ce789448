"""What a model keeps of its past, and how a prompt is continued on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from recmas.splice import Prompt


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
        cache: holds the first `length` columns of the prompt already; None begins with an empty one.
        length: columns that `cache` holds.

    Attributes:
        decoder: as given.
        cache: what the decoder reads and appends to.
        length: columns fed so far.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        mask: Tensor,
        room: int,
        context: int | None = None,
        *,
        cache: DynamicCache | None = None,
        length: int = 0,
    ) -> None:
        self.decoder, self._last = decoder, None if context is None else context - 1
        self.cache = new_cache(decoder) if cache is None else cache
        self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], room)], dim=1)
        self._positions = positions_of(self._mask, self._last)
        self.length = length

    @property
    def mask(self) -> Tensor:
        """int64 ``[B, length]`` of what was fed."""
        return self._mask[:, : self.length]

    def feed(self, embeds: Tensor) -> Tensor:
        """Append ``[B, S, d]`` input embeddings; the final-norm hidden state ``[B, d]`` at the last one."""
        start, self.length = self.length, self.length + embeds.shape[1]
        if self.length > self._mask.shape[1]:
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], self.length)], dim=1)
            self._positions = positions_of(self._mask, self._last)
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=self._positions[:, start : self.length],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]


Reader = Callable[[PreTrainedModel, Prompt, int, int | None], tuple[Continuation, Tensor]]
"""``reader(decoder, prompt, room, context)``: a continuation that has read the prompt, and the final-norm hidden state
``[B, d]`` at its last position; the other arguments are those of `Continuation`."""


def read(
    decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None = None
) -> tuple[Continuation, Tensor]:
    """The plain `Reader`: the whole prompt at once, into an empty cache."""
    past = Continuation(decoder, prompt.mask, room, context)
    return past, past.feed(prompt.embeds)


def positions_of(mask: Tensor, last: int | None = None) -> Tensor:
    """Position ids int64 ``[B, T]``: the number of unmasked inputs before each one, `last` at most."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0, max=last)


def length_dependent(config: Any) -> bool:
    """Whether rotary frequencies change with the length of the input, so that what stands first depends on the rest."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(str(kind.get("rope_type", "default")) in ("dynamic", "longrope") for kind in kinds)


def new_cache(decoder: PreTrainedModel) -> DynamicCache:
    """The empty cache this decoder needs; without gradients its attention layers grow in place."""
    cache = DynamicCache(config=decoder.config)
    if not torch.is_grad_enabled():
        cache.layers = [_roomy(layer) for layer in cache.layers]
    return cache


def _roomy(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return RoomyLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return RoomySlidingLayer(layer.sliding_window)
    return layer


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow; transformers' own layer copies all of them at every step.

    For the CPU rollout of 32 steps on a prompt of 300 (8 layers, d=512, 4 rows) that copying was a fifth of the time.
    `keys` and `values` are views ``[B, heads, T, d]`` of all that is held.
    """

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Begin with copies of keys and values ``[B, heads, T, d]`` and room for so many more."""
        self.lazy_initialization(keys, values)
        self._buffers = [_grown(states, keys.shape[2] + room) for states in (keys, values)]
        self.keys, self.values = (buffer[:, :, : keys.shape[2]] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, S, d]``; views of all that is held, ``[B, heads, T, d]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states[:, :, :0] for states in (key_states, value_states)]
            self.keys, self.values = self._buffers
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            start = self._needed(start)
            end = start + key_states.shape[2]
            held = (states[:, :, states.shape[2] - start :] for states in (self.keys, self.values))
            self._buffers = [_grown(states, end + max(end // 2, 64)) for states in held]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _needed(self, length: int) -> int:
        """Of so many columns held, the last ones that have to be carried into larger buffers."""
        return length


class RoomySlidingLayer(RoomyLayer, DynamicSlidingWindowLayer):
    """A sliding window over buffers with room: it moves in place, and leaves the past behind when the room is used up.

    So right after a prompt was read all of it is still held, and a prefix of it can be kept.
    """

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().hold(keys, values, room)
        self.cumulative_length = keys.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, S, d]``; views of the window before them and of them."""
        visible = min(self.cumulative_length, self.sliding_window - 1) + key_states.shape[2]
        self.cumulative_length += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        return keys[:, :, keys.shape[2] - visible :], values[:, :, values.shape[2] - visible :]

    def _needed(self, length: int) -> int:
        return min(length, self.sliding_window - 1)


def _grown(held: Tensor, capacity: int) -> Tensor:
    """A buffer of `capacity` positions that begins with what is held."""
    batch, heads, length, width = held.shape
    buffer = held.new_empty(batch, heads, capacity, width)
    buffer[:, :, :length] = held
    return buffer
