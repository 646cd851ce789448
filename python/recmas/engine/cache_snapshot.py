"""A copy of what a KV cache holds of prompts, from which later prompts with the same prefix are continued."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import LinearAttentionLayer

from recmas.engine.continuation import Continuation, length_dependent
from recmas.engine.growing_cache import GrowingLayer, GrowingSlidingLayer, new_cache
from recmas.engine.model_state import ModelState

Ids = Sequence[Sequence[int]]
# DummyLayer holds nothing; older versions of transformers have none.
_COPIED = (GrowingLayer, GrowingSlidingLayer, LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None))


@dataclass
class Snapshot:
    """What a cache held when every row had read so many of its tokens.

    Attributes:
        decoder: whose cache it was.
        device: where the decoder was then; with offload it may work on another one later.
        state: of the decoder, before it read any of the tokens.
        ids: tokens that each row had read; a single row stands for all rows.
        pads: columns of padding before them.
        layers: per layer, keys and values ``[rows, heads, columns, d]``, a recurrent layer, or None for one that holds
            nothing.
    """

    decoder: PreTrainedModel
    device: torch.device
    state: ModelState
    ids: Ids
    pads: list[int]
    layers: list[tuple[Tensor, Tensor] | LinearAttentionLayer | None]

    @classmethod
    def of(cls, past: Continuation, state: ModelState, ids: Ids, pads: Sequence[int]) -> Snapshot:
        """Copies from a continuation that has read `ids` after `pads` columns of padding, and perhaps more.

        A recurrent layer must have read no more. `state` is that of the decoder before it read.
        """
        columns = max(pad + len(row) for pad, row in zip(pads, ids, strict=True))
        layers = [_copy(layer, columns) for layer in past.cache.layers]
        return cls(past.decoder, past.mask.device, state, ids, list(pads), layers)

    def select(self, rows: Sequence[int]) -> Snapshot:
        """Of some rows of its batch."""
        if len(self.ids) == 1:
            return self
        index = torch.tensor(rows, device=self.device)
        layers: list[tuple[Tensor, Tensor] | LinearAttentionLayer | None] = []
        for held in self.layers:
            if isinstance(held, LinearAttentionLayer):
                held = copy.deepcopy(held)
                held.reorder_cache(index)
            layers.append((held[0][index], held[1][index]) if isinstance(held, tuple) else held)
        ids, pads = [self.ids[row] for row in rows], [self.pads[row] for row in rows]
        return replace(self, ids=ids, pads=pads, layers=layers)

    def cut(self, prefix: Ids, pads: Sequence[int], last: int) -> int:
        """The column before which a left-padded prompt can be continued from here; 0: nowhere.

        Args:
            prefix: per row, the ids before the prompt's first slot.
            pads: columns of padding before them.
            last: the greatest column to return.
        """
        ids = self.ids if len(self.ids) == len(prefix) else [self.ids[0]] * len(prefix)
        cut = common_columns(prefix, ids, pads, last)
        if not any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return cut
        wanted = {pad + len(row) for pad, row in zip(pads, ids, strict=True) if row}
        return wanted.pop() if len(wanted) == 1 and max(wanted) <= cut else 0

    def resume(self, mask: Tensor, cut: int, pads: Sequence[int], room: int, context: int | None) -> Continuation:
        """A continuation of prompts ``[B, T]`` that has read all before column `cut`, on copies.

        Args:
            mask: of the prompts.
            cut: as `cut` returned it, or less where no layer is recurrent.
            pads: columns of padding of the prompts.
            room: positions that will likely be fed after the prompts.
            context: as for `Continuation`.
        """
        cache = new_cache(self.decoder)
        batch, rows = len(pads), len(self.ids)
        shifts = [self.pads[row % rows] - pads[row] for row in range(batch)]
        columns = torch.arange(cut) + torch.tensor(shifts)[:, None]
        index = columns.clamp_(min=0).to(mask.device)  # what stands in the padding is masked
        for position, (layer, held) in enumerate(zip(cache.layers, self.layers, strict=True)):
            if isinstance(held, tuple):
                keys, values = (_columns(states, batch, shifts, index) for states in held)
                layer.hold(keys, values, mask.shape[1] - cut + room)
            elif held is not None:
                cache.layers[position] = twin = copy.deepcopy(held)
                if rows < batch:
                    twin.reorder_cache(torch.zeros(batch, dtype=torch.int64, device=mask.device))
        return Continuation(self.decoder, mask, room, context, cache=cache, length=cut)


def unsupported(decoder: PreTrainedModel, cache: DynamicCache) -> str:
    """Why nothing can be kept of this model's cache; empty if it can."""
    if torch.is_grad_enabled():
        return "gradients are kept"
    if length_dependent(decoder.config):
        return "the model's position encoding depends on the length of its input"
    for layer in cache.layers:
        if type(layer) not in _COPIED:
            return f"a cache layer of type {type(layer).__name__} cannot be copied"
    return "" if cache.layers else "the model keeps no cache"


def common_columns(rows: Ids, others: Ids, pads: Sequence[int], last: int) -> int:
    """The column, `last` at most, before which every row of left-padded `rows` agrees with its other."""
    return min(last, *(pad + agreeing(row, other) for row, other, pad in zip(rows, others, pads, strict=True)))


def agreeing(row: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin alike with."""
    length = min(len(row), len(other))
    if row[:length] == other[:length]:
        return length
    return next((index for index in range(length) if row[index] != other[index]), length)


def _copy(layer: Any, columns: int) -> tuple[Tensor, Tensor] | LinearAttentionLayer | None:
    if isinstance(layer, LinearAttentionLayer):
        return copy.deepcopy(layer)
    if layer.keys is None:  # nothing is kept here, or nothing has come
        return None
    return layer.keys[:, :, :columns].clone(), layer.values[:, :, :columns].clone()


def _columns(states: Tensor, batch: int, shifts: Sequence[int], index: Tensor) -> Tensor:
    """States ``[B, heads, C, d]`` at the columns `index` ``[B, C]``, which begin at `shifts`."""
    states = states.expand(batch, -1, -1, -1)
    if min(shifts) == max(shifts) >= 0:
        return states[:, :, shifts[0] : shifts[0] + index.shape[1]]
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
