"""What keeps the graph of several rounds small: prefixes are read once, activations computed again instead of kept.

What stands before a prompt's first slot depends on no link. Each agent reads it once per step, without gradients, and
every visit goes on from its keys and values, as far as it begins in the same way: the backward never enters it. That
needs layers whose past is keys and values; recurrent ones read their whole prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from recmas.agents.agent import Agent
from recmas.engine.continuation import length_dependent, positions_of
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.messages import Prompt

Column = tuple["int | None", ...]
"""Of a batch of prompts: a token id per row, None for padding."""
CacheClass = TypeVar("CacheClass", bound=Cache)


class SharedPrefixes:
    """The prefixes of one step's prompts, by role: the last one each agent has read."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[list[Column], DynamicCache]] = {}

    def of(self, role: str, agent: Agent, prompt: Prompt) -> DynamicCache | None:
        """A cache that holds the prompts' first columns, up to where some row's first slot may begin.

        None where there is nothing to spare: no gradients are recorded, the prompt begins with a slot, or the model
        keeps more of its past than keys and values, or reads a beginning otherwise than the whole.
        """
        if not torch.is_grad_enabled() or prompt.prefix is None:
            return None
        pads = (prompt.mask == 0).sum(dim=1).tolist()
        rows = [[None] * pad + list(ids) for pad, ids in zip(pads, prompt.prefix, strict=True)]
        length = min([*map(len, rows), prompt.mask.shape[1] - 1])
        least = max(pads) + 1  # columns that show something of every row
        if length < least:
            return None
        known = list(zip(*(row[:length] for row in rows), strict=True))
        if role in self._held:
            held, cache = self._held[role]
            common = next((at for at, (a, b) in enumerate(zip(held, known, strict=False)) if a != b), None)
            common = min(len(held), length) if common is None else common
            if 2 * common >= length and common >= least and (begun := cropped(cache, common)):
                return begun
        cache = DynamicCache(config=agent.decoder.config)
        if unforkable(cache) or length_dependent(agent.decoder.config):
            return None
        mask = prompt.mask[:, :length]
        with torch.no_grad():
            DecoderCall(agent.decoder)(prompt.embeds[:, :length], mask, positions_of(mask), cache)
        self._held[role] = known, cache
        return fork(cache)


def fork(cache: CacheClass) -> CacheClass:
    """A cache that grows by itself from what this one holds; such layers replace their keys and values as they grow."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def cropped(cache: DynamicCache, length: int) -> DynamicCache | None:
    """A fork that holds the first so many columns; None where a sliding window has lost some of them."""
    forked = fork(cache)
    for layer in forked.layers:
        if layer.keys is None:  # a layer that this model's texts do not pass, such as one that reads images
            continue
        if layer.keys.shape[2] < layer.get_seq_length() > length:
            return None
        if length < layer.get_seq_length():
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
    return forked


def rows_of(cache: CacheClass, rows: slice) -> CacheClass:
    """A fork that holds these rows of the batch."""
    forked = fork(cache)
    for layer in forked.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return forked


def unforkable(cache: Cache) -> str:
    """Why this cache has no forks: it keeps more of the past than keys and values; empty if it does not."""
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return f"a cache layer of type {kinds.pop().__name__} is not forked" if kinds else ""


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformers decoder, without those that are inside others."""
    found = [part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if layer not in inner]


@contextmanager
def recomputing(decoder: nn.Module, enabled: bool) -> Iterator[None]:
    """Within, each of the decoder's layers keeps its input alone and runs again in the backward, inner layers and all.

    The backward may come later. A layer inside another one runs with it: as a checkpoint of its own it would be one in
    the forward and none in the backward, whose tensors would then be taken for others.
    """
    layers = layers_of(decoder) if enabled else []
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(_again, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward`` under a checkpoint; each of its runs appends to forks of the caches as they now are."""

    def run(*args: Any) -> Any:
        return forward(*map(_forked, args), **{name: _forked(value) for name, value in kwargs.items()})

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _forked(value: Any) -> Any:
    return fork(value) if isinstance(value, Cache) else value
