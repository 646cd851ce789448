"""A batch of sequences that grows on one KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.engine.decoder_call import DecoderCall
from recmas.engine.growing_cache import new_cache
from recmas_kernels import DecoderSteps


class Past(ABC):
    """A batch of sequences that grows; rollout and decoding run on any.

    Attributes:
        decoder: body of a transformers model (no LM head).
    """

    decoder: PreTrainedModel

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """int64 ``[B, length]`` of what was fed."""

    @abstractmethod
    def feed(self, embeds: Tensor) -> Tensor:
        """Append ``[B, S, d]`` input embeddings; the final-norm hidden state ``[B, d]`` at the last one."""


class Continuation(Past):
    """A batch of left-padded sequences that grows on one cache.

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
        last: the last position that the model has; None if `context` is.
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
        self.decoder, self.last = decoder, None if context is None else context - 1
        self.cache = new_cache(decoder) if cache is None else cache
        self._call = DecoderCall(decoder)
        self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], room)], dim=1)
        self._foresee()
        self.length = length

    @property
    def mask(self) -> Tensor:
        return self._mask[:, : self.length]

    def feed(self, embeds: Tensor) -> Tensor:
        start, self.length = self.length, self.length + embeds.shape[1]
        if self.length > self._mask.shape[1]:
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], self.length)], dim=1)
            self._foresee()

        def call() -> Tensor:
            return self._call(embeds, self.mask, self._positions[:, start : self.length], self.cache)

        hidden = self._steps(embeds, start, call) if embeds.shape[1] == 1 else call()
        return hidden[:, -1]

    def _foresee(self) -> None:
        self._positions = positions_of(self._mask, self.last)
        self._steps = DecoderSteps(self.decoder, self.cache, self._mask, self._positions)


class SingleSteps(Continuation):
    """Goes on by one position at a time, for models whose states go on right only so."""

    def feed(self, embeds: Tensor) -> Tensor:
        if self.length == 0:
            return super().feed(embeds)
        for column in range(embeds.shape[1]):
            hidden = super().feed(embeds[:, column : column + 1])
        return hidden


def positions_of(mask: Tensor, last: int | None = None) -> Tensor:
    """Position ids int64 ``[B, T]``: the number of unmasked inputs before each one, `last` at most."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0, max=last)


def frequency_switch(config: Any) -> int | None:
    """The length beyond which rotary frequencies are others (LongRoPE); None where they never change.

    Dynamic NTK scaling changes them beyond the context only.
    """
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    switches = [int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(switches, default=None)


def length_dependent(config: Any) -> bool:
    """Whether rotary frequencies change with the length of the input, so that a prefix depends on what follows."""
    return frequency_switch(config) is not None
