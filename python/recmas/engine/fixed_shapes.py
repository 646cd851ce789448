"""The decoder's step at fixed shapes and addresses: what can be captured once, compiled once, and run for every batch.

A batch takes the next larger bucket of rows and columns. Columns that hold nothing are masked; rows that no sequence
needs repeat the last one. The column that a step writes, its positions and its masks are tensors that the step itself
moves on, so that no step differs from another in anything but the contents of the same buffers.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from recmas.engine.abilities import missing
from recmas.engine.cache_snapshot import unsupported
from recmas.engine.continuation import Continuation, Past
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.hooks import hooked

_KINDS = {False: "full_attention", True: "sliding_attention"}
_UNBOUNDED = 1 << 62
_ALONE: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
"""Else torch counts all buckets of all agents as one function, and runs those after the eighth without compiling."""


class FixedShapeContinuation:
    """Continues batches that fit a bucket, one position at a time.

    Args:
        past: the first batch to continue; its cache says which buffers are needed.
        rows: of the bucket.
        columns: of the bucket: prompt and all steps.
        compiled: the step is run by `torch.compile`, at shapes that never change.

    Attributes:
        decoder: of `past`.
        cache: fixed buffers.
        length: columns that hold something; whoever steps counts them.
        last: the last position that the decoder has; None if it does not say.
    """

    def __init__(
        self, past: Continuation | FixedShapeContinuation, rows: int, columns: int, *, compiled: bool = False
    ) -> None:
        embedding = past.decoder.get_input_embeddings().weight
        self.decoder: PreTrainedModel = past.decoder
        self.length = 0
        self.last: int | None = past.last
        self.rows, self.columns, self._call = rows, columns, DecoderCall(past.decoder)
        self._dtype, device = embedding.dtype, embedding.device
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._limit = torch.zeros(1, dtype=torch.int64, device=device)
        self._closed = torch.finfo(self._dtype).min
        self._full = torch.full((rows, 1, 1, columns), self._closed, dtype=self._dtype, device=device)
        self._numbers = torch.arange(columns, device=device)
        self._window: int | None = None
        self.cache = DynamicCache()
        kinds = set()
        for layer in past.cache.layers:
            window = getattr(layer, "sliding_window", None)
            self._window = self._window if window is None else window
            self.cache.layers.append(_like(layer, rows, columns, self._column))
            if hasattr(layer, "keys"):
                kinds.add(_KINDS[window is not None])
        self._sliding = torch.empty_like(self._full)
        masks = {"full_attention": self._full, "sliding_attention": self._sliding}
        self._masks: Any = masks if len(kinds) > 1 else masks[kinds.pop()]
        self._compiled: Any = torch.compile(self._body, dynamic=False, **_ALONE) if compiled else None
        self._run: Any = self._compiled or self._body

    @property
    def mask(self) -> Tensor:
        """int64 ``[rows, length]`` of what was fed."""
        return (self._full[:, 0, 0, : self.length] == 0).to(torch.int64)

    def load(self, past: Continuation | FixedShapeContinuation) -> None:
        """Take over a batch ``[B]`` that has read T columns; B and T plus the steps to come must fit."""
        mask, self.last = past.mask, past.last
        batch, self.length = mask.shape
        length = self.length
        last = torch.arange(self.rows, device=mask.device).clamp_(max=batch - 1)
        mask = mask[last]
        self._column.fill_(length)
        self._limit.fill_(_UNBOUNDED if self.last is None else self.last)
        torch.minimum(mask.sum(dim=1, keepdim=True), self._limit, out=self._positions)
        self._full.fill_(self._closed)
        self._full[:, 0, 0, :length].masked_fill_(mask == 1, 0)
        for layer, held in zip(self.cache.layers, past.cache.layers, strict=True):
            _fill(layer, held, last, length)

    def look(self) -> None:
        """Run eagerly while the decoder has hooks: a compiled step does not call those that came later."""
        if self._compiled is not None:
            self._run = self._body if hooked(self.decoder) else self._compiled

    def step(self, embeds: Tensor) -> Tensor:
        """Final-norm hidden states ``[rows, d]`` after one more position ``[rows, d]``."""
        self._full.index_fill_(3, self._column, 0)
        if self._window is not None:
            left = self._numbers <= self._column - self._window
            self._sliding.copy_(self._full).masked_fill_(left, self._closed)
        hidden = self._run(embeds[:, None].to(self._dtype))
        self._column.add_(1)
        torch.minimum(self._positions.add_(1), self._limit, out=self._positions)
        return hidden

    def _body(self, embeds: Tensor) -> Tensor:
        return self._call(embeds, self._masks, self._positions, self.cache)[:, -1]


def unfit(past: Past) -> str:
    """Why this model cannot be continued at fixed shapes; empty if it can."""
    decoder = past.decoder
    if not isinstance(past, Continuation):
        return "the batch does not grow on one cache"
    if reason := unsupported(decoder, past.cache):
        return reason
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        return f"masks of {decoder.config._attn_implementation} attention are not made here"
    if not any(hasattr(layer, "keys") for layer in past.cache.layers):
        return "no layer of the model attends"
    return missing(decoder, "fixed shapes")


def bucket(batch: int, length: int) -> tuple[int, int]:
    """Rows and columns of the bucket: powers of two up to 8 and multiples of 8; multiples of 64, then of an eighth."""
    rows = 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8
    grain = max(64, (1 << (length - 1).bit_length()) // 8)
    return rows, -(-length // grain) * grain


class _FixedLayer(StaticLayer):
    """Keys and values ``[rows, heads, columns, d]``, written at the one column that all layers share."""

    def __init__(self, layer: Any, rows: int, columns: int, column: Tensor) -> None:
        super().__init__(max_cache_len=columns)
        keys, values = layer.keys, layer.values
        self.sliding_window = getattr(layer, "sliding_window", None)
        self.lazy_initialization(keys[:1].expand(rows, -1, -1, -1), values[:1].expand(rows, -1, -1, -1))
        self._column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values


def _like(layer: Any, rows: int, columns: int, column: Tensor) -> Any:
    if isinstance(layer, LinearAttentionLayer):
        twin = copy.deepcopy(layer)
        twin.reorder_cache(torch.zeros(rows, dtype=torch.int64, device=column.device))
        return twin
    if layer.keys is None:  # nothing is kept here, or nothing has come
        return copy.copy(layer)
    return _FixedLayer(layer, rows, columns, column)


def _fill(layer: Any, held: Any, rows: Tensor, length: int) -> None:
    """Copy what a batch's layer holds of its first `length` columns, a row of the batch per row of the bucket."""
    if isinstance(held, LinearAttentionLayer):
        for own, states in ((layer.conv_states, held.conv_states), (layer.recurrent_states, held.recurrent_states)):
            for number, state in states.items():
                if state is not None:
                    own[number].copy_(state[rows])
    elif held.keys is not None:
        for buffer, states in ((layer.keys, held.keys), (layer.values, held.values)):
            buffer.zero_()  # masked or not, a NaN that an earlier batch left would spread
            count = min(states.shape[2], length)  # a window may have dropped its first columns
            buffer[:, :, length - count : length] = states[rows, :, :count]
