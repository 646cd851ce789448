"""Caches that grow in place hold what transformers' own hold, whatever is done to them between two positions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from recmas.engine.growing_cache import ROOM, GrowingCache, GrowingLayer, new_cache
from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from tests.runtime.tiny import tiny_model

STEPS, WIDTH = 3, 32


def _states(seed: int, rows: int, count: int = 1) -> Tensor:
    return 0.3 * torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(seed))


class Pair:
    """A decoder, accelerated or not, with a growing cache, and the plain one with transformers' own."""

    def __init__(self, family: str, packed: bool, begin: Callable[[Any], None] = lambda cache: None) -> None:
        self.decoders = [tiny_model(family).eval().requires_grad_(False).model for _ in range(2)]
        self.done = accelerate(self.decoders[0]) if packed else None
        self.caches: list[Any] = [new_cache(self.decoders[0]), DynamicCache(config=self.decoders[1].config)]
        for cache in self.caches:
            begin(cache)
        self.rows, self.steps = 2, 0
        self.read(7)

    def read(self, count: int = 1) -> None:
        """One call of each, with the same result and the same states in both caches."""
        self.steps += 1
        found, expected = (
            decoder(inputs_embeds=_states(self.steps, self.rows, count), past_key_values=cache).last_hidden_state
            for decoder, cache in zip(self.decoders, self.caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(*(cache.layers for cache in self.caches), strict=True):
            assert ours.get_seq_length() == theirs.get_seq_length()
            for name in ("keys", "values"):
                held, length = getattr(theirs, name), getattr(theirs, name).shape[2]
                torch.testing.assert_close(
                    getattr(ours, name)[:, :, -length:].to(held.dtype), held, rtol=1e-4, atol=1e-4
                )

    def each(self, change: Callable[[Any], Any]) -> None:
        for cache in self.caches:
            change(cache)


def _assign(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = 2 * layer.keys, 3 * layer.values


def _other_dtype(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()


def _one_layer_replaced(cache: Any) -> None:
    layer = DynamicCache(config=tiny_model("llama").config).layers[1]
    layer.update(cache.layers[1].keys.clone(), cache.layers[1].values.clone())
    cache.layers[1] = layer


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {  # and the rows after it
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), 4),
    "assigned": (_assign, 2),
    "reset": (lambda cache: cache.reset(), 3),
    "another dtype": (_other_dtype, 2),
    "in place": (lambda cache: [layer.keys.mul_(2) for layer in cache.layers], 2),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_cache_that_was_changed_goes_on_from_what_it_is(family: str, packed: bool, change: str):
    pair = Pair(family, packed)
    for _ in range(STEPS):
        pair.read()
    made, pair.rows = CHANGES[change]
    pair.each(made)
    for _ in range(STEPS):
        pair.read()


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_cropped_caches(packed: bool):
    pair = Pair("llama", packed)
    for count in (-2, -1, -3):
        pair.read()
        pair.each(lambda cache, count=count: cache.crop(count))
    pair.read()
    pair = Pair("mistral", packed, lambda cache: cache.activate_past_recording())  # beyond the window of 6
    for _ in range(2):
        for _ in range(ROOM + 2):  # the last but one replaces the buffers, which keep the past
            pair.read()
        pair.each(lambda cache: cache.crop(-4))
    pair.read()


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_layers_that_stand_in_two_places(packed: bool):
    pair = Pair("llama", packed, lambda cache: setattr(cache, "layers", [cache.layers[0]] * 3))
    for _ in range(ROOM // 2):
        pair.read()


@torch.no_grad()
def test_one_layer_of_another_kind_and_copies_and_early_caches():
    pair = Pair("llama", True)
    pair.each(_one_layer_replaced)
    pair.read()
    for how in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        pair.caches = [how(cache) for cache in pair.caches]
        pair.read()
    shape = (2, 2, 8, torch.float32, torch.device("cpu"))
    pair = Pair("llama", True, lambda cache: cache.early_initialization(*shape))
    pair.read()


@torch.no_grad()
def test_other_rows_are_an_error_and_change_nothing():
    pair = Pair("llama", True)
    pair.rows = 1
    with pytest.raises(ValueError, match="keys of 1 rows and 2 heads for a cache that holds 2 rows and 2 heads"):
        pair.read()
    assert [layer.get_seq_length() for layer in pair.caches[0].layers] == [7, 7, 7]
    pair.rows = 2
    pair.read()


class _Telling(GrowingCache):
    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.told = [*getattr(self, "told", []), index]
        return super().update(keys, values, index, *more, **options)


@torch.no_grad()
def test_every_update_that_somebody_wrote_is_called():
    pair, told = Pair("llama", True), []
    telling = _Telling(config=pair.decoders[0].config)
    telling.layers = pair.caches[0].layers
    pair.caches[0] = telling
    pair.read()
    assert telling.told == [0, 1, 2]
    for owner in (Cache, GrowingLayer):
        pair, real = Pair("llama", True), owner.update

        def update(part: Any, *given: Any, real: Any = real, **more: Any) -> Any:
            told.append(part)
            return real(part, *given, **more)

        with mock.patch.object(owner, "update", update):
            pair.read()
        assert sum(part is pair.caches[0] or part in pair.caches[0].layers for part in told) == 3
        told.clear()
    for part in (pair.caches[0], pair.caches[0].layers[1]):
        with mock.patch.object(part, "update", wraps=part.update) as wrapped:
            pair.read()
        assert wrapped.call_count == (3 if part is pair.caches[0] else 1)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_hidden_states_asked_for_by_the_configuration_are_as_many(before: bool):
    found = []
    for packed in (True, False):
        decoder = tiny_model("llama").eval().requires_grad_(False).model
        decoder.config.output_hidden_states = before
        done = accelerate(decoder) if packed else None
        cache = new_cache(decoder)
        for count in (7, 1):
            decoder(inputs_embeds=_states(count, 2, count), past_key_values=cache)
        decoder.config.output_hidden_states = True
        found.append(decoder(inputs_embeds=_states(9, 2), past_key_values=cache).hidden_states)
        assert (done is not None) == packed
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@torch.no_grad()
def test_looking_at_a_decoder_leaves_its_position_encoding():
    """One that depends on the longest text so far keeps that in the module."""
    pair = Pair("llama", False)
    for decoder in pair.decoders:
        decoder.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        decoder.config.max_position_embeddings = 6
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
    with accelerate(pair.decoders[0]) as done:
        assert done.models
        pair.caches = [new_cache(pair.decoders[0]), DynamicCache(config=pair.decoders[1].config)]
        pair.read(7)
        for _ in range(STEPS):
            pair.read()
        for decoder in pair.decoders:
            decoder.config.marked = object()
        pair.each(lambda cache: cache.crop(-3))
        pair.read()
        pair.read()
        assert pair.decoders[0].rotary_emb.max_seq_len_cached == pair.decoders[1].rotary_emb.max_seq_len_cached
