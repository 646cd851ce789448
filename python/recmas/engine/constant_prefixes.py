"""What all prompts of a template begin with, read once for many batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from recmas.engine.cache_snapshot import Snapshot, agreeing
from recmas.engine.continuation import Continuation
from recmas.engine.messages import Prompt
from recmas.engine.model_state import ModelState, ModelStates

LEAST_POSITIONS = 64
"""Positions of a prefix that is read by itself: that takes a forward of its own, which fewer do not pay for."""
VARIANTS = 2
"""Snapshots of one template's prefix: what a row says after it may change its last token. The one unused for longest
goes first."""


class ConstantPrefixes:
    """Snapshots of prefixes that outlive a batch; a prefix is read again once its model has changed.

    Args:
        states: what the models compute with, for all who read through these prefixes; `ModelState` says which changes
            are seen. None begins anew.
    """

    def __init__(self, states: ModelStates | None = None) -> None:
        self.states = states or ModelStates()
        self._kept: dict[tuple[PreTrainedModel, torch.device, tuple[int, ...], tuple[int, ...]], Snapshot] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def have(self, decoder: PreTrainedModel, constant: Sequence[int]) -> bool:
        """Whether there is a snapshot of this prefix."""
        return any(key[0] is decoder and key[2] == tuple(constant) for key in self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def of(
        self, decoder: PreTrainedModel, state: ModelState, constant: Sequence[int], prompt: Prompt
    ) -> tuple[Snapshot | None, int]:
        """The snapshot of a prefix, and how many positions were read to make it.

        Args:
            decoder: whose.
            state: the decoder's now, from `states`.
            constant: what prompts begin with, but perhaps for its last tokens: a row's own text may change them.
            prompt: a batch. What its longest row has of the prefix is what is read, so that the bits of a row's answer
                do not depend on earlier batches; nothing, where that is fewer than `LEAST_POSITIONS`.
        """
        longest = int(prompt.mask[:, 0].argmax())
        row = [] if prompt.prefix is None else prompt.prefix[longest]
        ids = tuple(row[: agreeing(row, constant)])
        if len(ids) < LEAST_POSITIONS:
            return None, 0
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] is not decoder or kept.state is state}
        key = decoder, prompt.embeds.device, tuple(constant), ids
        if (found := self._kept.pop(key, None)) is not None:
            self._kept[key] = found
            return found, 0
        others = [other for other in self._kept if other[:3] == key[:3]]
        for other in others[: 1 - VARIANTS]:
            del self._kept[other]
        begun = Continuation(decoder, prompt.mask[longest : longest + 1, : len(ids)], 0)
        begun.feed(prompt.embeds[longest : longest + 1, : len(ids)])
        self._kept[key] = Snapshot.of(begun, state, [list(ids)], [0])
        return self._kept[key], len(ids)
