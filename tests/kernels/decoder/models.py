"""Decoders without masks and embeddings of their own, in plain torch, and caches with room for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import model as decoder_model
from recmas_kernels.decoder import parts as decoder_parts
from tests.kernels.decoder.layers import Layer, Sizes, Step

LAYERS = 4


class Model(nn.Module):
    """A decoder without masks and embeddings of its own."""

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(**kind) for _ in range(LAYERS)])
        for index, layer in enumerate(self.layers):
            layer.self_attn.layer_idx = index
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, output_hidden_states=False)
        self.turned, self.mask = Step.random(2, 1, False, kind.get("sizes")).turned, None
        self.eval()

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, use_cache: bool = True, **more: Any) -> Any:
        x, seen = 2 * inputs_embeds, []
        turned = tuple(angles[: len(x)] for angles in self.turned)
        for layer in self.layers[: self.config.num_hidden_layers]:
            if more.get("output_hidden_states") or self.config.output_hidden_states:
                seen.append(x)
            x = layer(
                x,
                attention_mask=self.mask,
                position_embeddings=turned,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
            x = self.between(x)
        return {"last": x + 1, "seen": seen}


class Doubled(Model):
    """Something is computed between its layers."""

    def between(self, x: Tensor) -> Tensor:
        return 2 * x


class Twice(Model):
    """Its first layer is called once more."""

    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        found = super().forward(inputs_embeds, past_key_values, use_cache)["last"]
        given = {"position_embeddings": self.turned, "past_key_values": past_key_values}
        return {"last": self.layers[0](found, **given)}


class Part(nn.Module):
    """It keeps what it was given last."""

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("kept", x)
        return x


class Hooking(Model):
    """It puts hooks on its layers when it is called, as transformers does; they do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        if past_key_values is None:
            for layer in self.layers:
                for part in layer.modules():
                    part.register_forward_hook(lambda *given: None)
        return super().forward(self.part(inputs_embeds), past_key_values, use_cache)


class Cache:
    """Of all layers, with room for some positions more."""

    def __init__(self, rows: int, sizes: Sizes, before: int = 5, dtype: torch.dtype = torch.float32) -> None:
        made = torch.Generator().manual_seed(3)
        shape = (LAYERS, 2, rows, sizes.key_heads, before + 9, sizes.head)
        self.held = torch.randn(shape, generator=made).to(dtype)
        self.lengths = [before] * LAYERS

    def _views(self, index: int) -> tuple[Tensor, Tensor]:
        keys, values = self.held[index, :, :, :, : self.lengths[index]]
        return keys, values

    def make_room(self, indices: Sequence[int], rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]] | None:
        for index in indices:
            self.lengths[index] += 1
        return [self._views(index) for index in indices]

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        self.lengths[index] += 1
        for states, new in zip(self._views(index), (keys, values), strict=True):
            states[:, :, -1:] = new
        return self._views(index)


class WithoutRoom(Cache):
    def make_room(self, indices: Sequence[int], rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]] | None:
        return None


@pytest.fixture(autouse=True)
def counted_as_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests count as those whose code was read."""
    monkeypatch.setattr(decoder_parts, "KNOWN", {f"{Layer.__module__}.{Layer.__qualname__}"})
    monkeypatch.setattr(
        decoder_model, "KNOWN", {f"{kind.__module__}.{kind.__qualname__}" for kind in (Model, Doubled, Twice, Hooking)}
    )


@contextmanager
def calls() -> Iterator[list[int]]:
    """How many layers each call of the kernels was of."""
    found: list[int] = []
    real = decoder.DecoderLayers.__call__

    def counted(layers: decoder.DecoderLayers, *given: Any) -> bool:
        found.append(layers.count)
        return real(layers, *given)

    with mock.patch.object(decoder.DecoderLayers, "__call__", counted):
        yield found


def step(model: Model, rows: int = 2, cache: type[Cache] = Cache, **given: Any) -> tuple[Tensor, Cache]:
    """Two positions, one after the other."""
    layer = model.layers[0]
    sizes = Sizes(
        head=layer.self_attn.head_dim, key_heads=layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
    )
    dtype, features = layer.input_layernorm.weight.dtype, layer.input_layernorm.weight.shape[0]
    held = cache(rows, sizes, dtype=dtype)
    x = torch.randn(2, rows, 1, features, generator=torch.Generator().manual_seed(4)).to(dtype)
    return torch.cat([model(inputs_embeds=each, past_key_values=held, **given)["last"] for each in x]), held


def one(model: Model, **given: Any) -> Any:
    return model(inputs_embeds=torch.ones(2, 1, 48), past_key_values=Cache(2, Sizes()), **given)
