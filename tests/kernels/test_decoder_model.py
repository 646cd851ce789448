"""Decoders whose layers run in one call: the same bits as layer by layer, and whatever may happen between layers."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from recmas_kernels import accelerate, decoder_model, decoder_parts
from recmas_kernels.backends import cpu, cpu_decoder
from recmas_kernels.decoder_model import ModelKernel
from recmas_kernels.testing import LOW_PRECISION
from tests.kernels.cpu_settings import AVAILABLE, guarded_allocations, instruction_set, threads
from tests.kernels.decoder_layers import Layer, Sizes, Step

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
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


class Cache:
    """Of all layers, with room for some positions more."""

    def __init__(self, rows: int, sizes: Sizes, before: int = 5, dtype: torch.dtype = torch.float32) -> None:
        made = torch.Generator().manual_seed(3)
        shape = (LAYERS, 2, rows, sizes.key_heads, before + 9, sizes.head)
        self.held = torch.randn(shape, generator=made).to(dtype)
        self.lengths, self.rooms = [before] * LAYERS, 0

    def _views(self, index: int) -> tuple[Tensor, Tensor]:
        keys, values = self.held[index, :, :, :, : self.lengths[index]]
        return keys, values

    def make_room(self, index: int) -> tuple[Tensor, Tensor] | None:
        self.rooms += 1
        self.lengths[index] += 1
        return self._views(index)

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        self.lengths[index] += 1
        for states, new in zip(self._views(index), (keys, values), strict=True):
            states[:, :, -1:] = new
        return self._views(index)


class WithoutRoom(Cache):
    def make_room(self, index: int) -> tuple[Tensor, Tensor] | None:
        return None


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests count as those whose code was read."""
    monkeypatch.setattr(decoder_parts, "KNOWN", {f"{Layer.__module__}.{Layer.__qualname__}"})
    monkeypatch.setattr(
        decoder_model, "KNOWN", {f"{kind.__module__}.{kind.__qualname__}" for kind in (Model, Doubled, Twice)}
    )


@contextmanager
def calls() -> Iterator[list[int]]:
    """How many layers each call of the kernels was of."""
    found: list[int] = []
    real = cpu_decoder.decoder_layers

    def counted(x: Tensor, y: Tensor, layers: list[Any]) -> bool:
        found.append(len(layers))
        return real(x, y, layers)

    with mock.patch.object(cpu_decoder, "decoder_layers", counted):
        yield found


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": True, "sizes": Sizes(features=40, heads=3, key_heads=1, head=22, hidden=50)},
    "gemma3": {"head_norms": True, "more_norms": True, "offset": 1.0},
}


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


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_call_has_the_bits_of_a_call_for_each_layer(isa: str, dtype: torch.dtype, kind: str):
    model = Model(**KINDS[kind]).to(dtype)
    model.turned = tuple(angles.to(dtype) for angles in model.turned)
    with instruction_set(isa), accelerate(model) as done, threads(2):
        assert list(done.models) == [""]
        expected, apart = step(model, cache=WithoutRoom)
        with calls() as found, guarded_allocations():
            together, cache = step(model)
        with threads(1):
            alone, _ = step(model)
    assert found == [LAYERS, LAYERS]
    assert torch.equal(together, expected)
    assert torch.equal(together, alone)
    assert torch.equal(cache.held, apart.held)


@pytest.mark.parametrize("kind", [Doubled, Twice])
@torch.no_grad()
def test_models_of_another_order_run_layer_by_layer(kind: type[Model]):
    plain, model = kind(), kind()
    with accelerate(model) as done, calls() as found:
        assert len(done.layers) == LAYERS
        assert not done.models
        torch.testing.assert_close(step(model)[0], step(plain)[0])
    assert not found


def _hook(model: Model) -> None:
    model.layers[2].register_forward_hook(lambda layer, x, y: 2 * y)


def _hook_before(model: Model) -> None:
    model.layers[2].register_forward_pre_hook(lambda layer, x: (2 * x[0],))


def _replaced(model: Model) -> None:
    torch.manual_seed(5)
    model.layers[2] = Layer()
    model.layers[2].self_attn.layer_idx = 2


CHANGES: dict[str, Callable[[Model], Any]] = {
    "hook": _hook,
    "hook before": _hook_before,
    "hook of the last": lambda model: model.layers[-1].register_forward_hook(lambda layer, x, y: 2 * y),
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", 2),
    "another configuration": lambda model: setattr(
        model, "config", SimpleNamespace(num_hidden_layers=2, output_hidden_states=False)
    ),
    "layer replaced": _replaced,
    "layers replaced": lambda model: setattr(model, "layers", nn.ModuleList([*model.layers][:3])),
    "layer left out": lambda model: model.layers.__delitem__(1),
    "order": lambda model: setattr(model, "layers", nn.ModuleList([model.layers[i] for i in (1, 0, 2, 3)])),
    "forward of a layer": lambda model: setattr(model.layers[1], "forward", lambda x, **given: 3 * x),
    "part of a layer": lambda model: setattr(model.layers[1].self_attn, "scaling", 0.5),
    "class": lambda model: setattr(model, "__class__", Doubled),
    "between": lambda model: setattr(model, "between", lambda x: 2 * x),
    "gradients": lambda model: model.layers[1].mlp.up_proj.requires_grad_(True),
    "a mask": lambda model: setattr(model, "mask", torch.tensor([[1, 0] * 3, [1, 1] * 3]).bool()[:, None, None]),
    "a mask of strides": lambda model: setattr(model, "mask", torch.ones(2, 1, 1, 12).bool()[..., ::2]),
    "strides": lambda model: setattr(model, "turned", tuple(a.repeat(1, 1, 2)[..., ::2] for a in model.turned)),
    "angles of a layer": lambda model: setattr(model.layers[2].self_attn, "head_dim", 16),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_model_changed_meanwhile_computes_what_it_is_now(change: str):
    plain, model = Model(), Model()
    with accelerate(model):
        step(model)
        for each in (plain, model):
            CHANGES[change](each)
        found, expected = one(model)["last"], one(plain)["last"]
    torch.testing.assert_close(found, expected)


def one(model: Model, **given: Any) -> Any:
    return model(inputs_embeds=torch.ones(2, 1, 48), past_key_values=Cache(2, Sizes()), **given)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_that_are_put_while_the_model_runs_see_what_stands_there(register: str):
    """As transformers puts those that collect hidden states."""
    plain, model = Model(), Model()
    states = one(plain, output_hidden_states=True)["seen"]
    real, seen = ModelKernel._opens, []

    def opens(kernel: ModelKernel, *given: Any) -> bool:
        opened = real(kernel, *given)
        put = getattr(model.layers[2], register)
        handles.append(put(lambda layer, x, *y: seen.extend(each.clone() for each in (x[0], *y))))
        return opened

    handles: list[Any] = []
    with accelerate(model):
        with mock.patch.object(ModelKernel, "_opens", opens), calls() as found:
            y = one(model)["last"]
        assert found == [2, 1]  # before the layer, and after it
        handles[0].remove()
        torch.testing.assert_close(y, one(plain)["last"])
    torch.testing.assert_close(seen, states[2 : 2 + len(seen)])
    assert len(seen) == (2 if register == "register_forward_hook" else 1)


@torch.no_grad()
def test_hidden_states_that_are_asked_for_are_those_between_layers():
    plain, model = Model(), Model()
    with accelerate(model):
        torch.testing.assert_close(one(model, output_hidden_states=True), one(plain, output_hidden_states=True))
        for each in (model, plain):
            each.config.output_hidden_states = True
        torch.testing.assert_close(one(model), one(plain))
    assert len(one(model)["seen"]) == LAYERS


@torch.no_grad()
def test_an_order_that_nobody_saw_is_an_error_and_no_result():
    model = Model()
    with accelerate(model):
        step(model)
        with (
            mock.patch.object(Model, "between", side_effect=KeyError("stop")),
            pytest.raises(KeyError, match="stop"),
        ):
            step(model)
        step(model)
        kernel = model.__dict__["forward"]
        kernel._layers = [*kernel._layers, Layer()]  # as if the last one were never reached
        with pytest.raises(RuntimeError, match="another order"):
            step(model)


@torch.no_grad()
def test_a_cache_that_the_kernels_cannot_read_is_still_written():
    class OfDoubles(Cache):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self.held = self.held.double()

    class Apart(Cache):
        """The last dimension is not dense."""

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self.held = self.held.transpose(-1, -2).contiguous().transpose(-1, -2)

    model = Model()
    with accelerate(model):
        expected, cache = step(model)
        found, apart = step(model, cache=Apart)
        assert torch.equal(apart.held, cache.held)
        torch.testing.assert_close(found, expected)
        with pytest.raises(RuntimeError, match="dtype"):  # as plain torch says it
            step(model, cache=OfDoubles)


@torch.no_grad()
def test_several_threads_run_one_model():
    model, faults = Model(), []
    with accelerate(model):
        expected = {rows: step(model, rows)[0] for rows in (1, 2)}

        def work(rows: int) -> None:
            with torch.no_grad():
                faults.extend(1 for _ in range(20) if not torch.equal(step(model, rows)[0], expected[rows]))

        workers = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not faults


@torch.no_grad()
def test_a_model_is_let_go_and_described_as_its_class_is():
    model = Model()
    done = accelerate(model)
    step(model)
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert "in one call" in str(done)
    done.close()
    assert "forward" not in model.__dict__
    done = accelerate(model)
    step(model)
    held = weakref.ref(model)
    gc.disable()
    try:
        del model, done
        assert held() is None
    finally:
        gc.enable()
