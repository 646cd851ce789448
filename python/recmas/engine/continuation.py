"""A batch of sequences that grows on one KV cache, and the prefill that begins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.engine.growing_cache import new_cache
from recmas.engine.messages import Prompt


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


Prefill = Callable[[PreTrainedModel, Prompt, int, int | None], tuple[Continuation, Tensor]]
"""``prefill(decoder, prompt, room, context)``: a continuation that has read the prompt, and the final-norm hidden state
``[B, d]`` at its last position; the other arguments are those of `Continuation`."""


def prefill_all(
    decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None = None
) -> tuple[Continuation, Tensor]:
    """The plain `Prefill`: the whole prompt at once, into an empty cache."""
    past = Continuation(decoder, prompt.mask, room, context)
    return past, past.feed(prompt.embeds)


def positions_of(mask: Tensor, last: int | None = None) -> Tensor:
    """Position ids int64 ``[B, T]``: the number of unmasked inputs before each one, `last` at most."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0, max=last)


def length_dependent(config: Any) -> bool:
    """Whether rotary frequencies change with the length of the input, so that a prefix depends on what follows."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(str(kind.get("rope_type", "default")) in ("dynamic", "longrope") for kind in kinds)
