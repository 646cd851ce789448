"""What all prompts of a template begin with, read once for many batches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from recmas.engine.cache_snapshot import Snapshot, agreeing
from recmas.engine.continuation import Continuation
from recmas.engine.messages import Prompt

LEAST_POSITIONS = 64
"""Positions of a prefix that is read by itself: that takes a forward of its own, which fewer do not pay for."""
_Weights = list[tuple[weakref.ref[torch.nn.Parameter], int]]


class ConstantPrefixes:
    """Snapshots of prefixes, for whoever promises that the models compute the same meanwhile.

    A prefix is read again where a parameter was replaced or written in place. Not seen are writes through ``.data``,
    and what is changed beside parameters: hooks, adapters that are switched, settings.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[PreTrainedModel, torch.device, tuple[int, ...]], Snapshot] = {}
        self._weights: dict[PreTrainedModel, _Weights] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._weights.clear()

    def of(self, decoder: PreTrainedModel, constant: Sequence[int], prompt: Prompt) -> tuple[Snapshot | None, int]:
        """The snapshot of a prefix, and how many positions were read to make it.

        Args:
            decoder: whose.
            constant: what prompts begin with, but perhaps for its last tokens: a row's own text may change them.
            prompt: a batch. What its longest row has of the prefix is what is read, so that the bits of a row's answer
                do not depend on earlier batches; nothing, where that is fewer than `LEAST_POSITIONS`.
        """
        longest = int(prompt.mask[:, 0].argmax())
        row = [] if prompt.prefix is None else prompt.prefix[longest]
        ids = tuple(row[: agreeing(row, constant)])
        if len(ids) < LEAST_POSITIONS:
            return None, 0
        if not _unwritten(decoder, self._weights.get(decoder, [])):
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] is not decoder}
            self._weights[decoder] = [(weakref.ref(weight), _writes(weight)) for weight in decoder.parameters()]
        key = decoder, prompt.embeds.device, ids
        if key in self._kept:
            return self._kept[key], 0
        begun = Continuation(decoder, prompt.mask[longest : longest + 1, : len(ids)], 0)
        begun.feed(prompt.embeds[longest : longest + 1, : len(ids)])
        self._kept[key] = Snapshot.of(begun, [list(ids)], [0])
        return self._kept[key], len(ids)


def _unwritten(decoder: PreTrainedModel, before: _Weights) -> bool:
    """Whether a decoder has the parameters that it had before, and none of them was written since."""
    now = [*decoder.parameters()]
    same = (count == _writes(weight) and held() is weight for weight, (held, count) in zip(now, before, strict=False))
    return len(now) == len(before) and all(same)


def _writes(weight: torch.nn.Parameter) -> int:
    """How often a parameter was written; those of inference mode do not count it."""
    return 0 if weight.is_inference() else weight._version
