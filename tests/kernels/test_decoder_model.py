"""Decoders whose layers run in one call: the same bits as layer by layer, and whatever may happen between layers."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import BaseTorchFunctionMode

from recmas_kernels import accelerate, decoder_model, decoder_parts
from recmas_kernels.backends import cpu, cpu_decoder
from recmas_kernels.decoder_layer import LayerKernel
from recmas_kernels.decoder_model import ModelKernel
from recmas_kernels.decoder_run import Known
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
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests count as those whose code was read."""
    monkeypatch.setattr(decoder_parts, "KNOWN", {f"{Layer.__module__}.{Layer.__qualname__}"})
    monkeypatch.setattr(
        decoder_model, "KNOWN", {f"{kind.__module__}.{kind.__qualname__}" for kind in (Model, Doubled, Twice, Hooking)}
    )


@contextmanager
def calls() -> Iterator[list[int]]:
    """How many layers each call of the kernels was of."""
    found: list[int] = []
    real = cpu_decoder.DecoderLayers.__call__

    def counted(layers: cpu_decoder.DecoderLayers, *given: Any) -> bool:
        found.append(layers.count)
        return real(layers, *given)

    with mock.patch.object(cpu_decoder.DecoderLayers, "__call__", counted):
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
    "order of a dictionary": lambda model: model.layers._modules.update({"0": model.layers._modules.pop("0")}),
    "forward of a layer": lambda model: setattr(model.layers[1], "forward", lambda x, **given: 3 * x),
    "part of a layer": lambda model: setattr(model.layers[1].self_attn, "scaling", 0.5),
    "class": lambda model: setattr(model, "__class__", Doubled),
    "between": lambda model: setattr(model, "between", lambda x: 2 * x),
    "gradients": lambda model: model.layers[1].mlp.up_proj.requires_grad_(True),
    "a mask": lambda model: setattr(model, "mask", torch.tensor([[1, 0] * 3, [1, 1] * 3]).bool()[:, None, None]),
    "a mask of strides": lambda model: setattr(model, "mask", torch.ones(2, 1, 1, 12).bool()[..., ::2]),
    "strides": lambda model: setattr(model, "turned", tuple(a.repeat(1, 1, 2)[..., ::2] for a in model.turned)),
    "index of a layer": lambda model: setattr(model.layers[2].self_attn, "layer_idx", 1),
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
    real, seen = ModelKernel._unchanged, []

    def unchanged(kernel: ModelKernel) -> Known | None:
        known = real(kernel)
        put = getattr(model.layers[2], register)
        handles.append(put(lambda layer, x, *y: seen.extend(each.clone() for each in (x[0], *y))))
        return known

    handles: list[Any] = []
    with accelerate(model):
        with mock.patch.object(ModelKernel, "_unchanged", unchanged), calls() as found:
            y = one(model)["last"]
        assert not found  # layer by layer
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
        kernel._known.layers = [*kernel._known.layers, Layer()]  # as if the last one were never reached
        unseen = mock.patch.object(decoder_model, "begins_with", return_value=True)
        with unseen, pytest.raises(RuntimeError, match="another order"):
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


def _calls_of_layers(name: str, log: list[Tensor]) -> Callable[..., Any]:
    real = getattr(nn.Module, name)

    def call(module: nn.Module, *given: Any, **more: Any) -> Any:
        y = real(module, *given, **more)
        if isinstance(module, Layer):
            log.append(y.clone())
        return y

    return call


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("owner", [nn.Module, Layer])
@torch.no_grad()
def test_whoever_stands_in_the_call_of_a_layer_sees_what_it_returns(owner: type, name: str):
    plain, model, seen = Model(), Model(), ([], [])
    with accelerate(model):
        step(model)
        for each, log in zip((model, plain), seen, strict=True):
            with mock.patch.object(owner, name, _calls_of_layers(name, log)):
                one(each)
        torch.testing.assert_close(seen[0], seen[1])
        with calls() as found:
            one(model)
    assert len(seen[0]) == LAYERS
    assert found == [LAYERS]


@torch.no_grad()
def test_functions_put_in_place_of_a_class_s_are_called():
    """They compute the same, so that only their calls show."""
    model, seen = Model(), []
    scope: dict[str, Any] = {"__name__": "elsewhere", "seen": seen, "real": Layer.forward, "whole": Model.forward}
    exec("def of_layer(*x, **more):\n    seen.append('layer')\n    return real(*x, **more)", scope)
    exec("def of_model(*x, **more):\n    seen.append('model')\n    return whole(*x, **more)", scope)
    with accelerate(model):
        step(model)
        with mock.patch.object(Layer, "forward", scope["of_layer"]):
            one(model)
        with mock.patch.object(Model, "forward", scope["of_model"]):
            one(model)
    assert seen == ["layer"] * LAYERS + ["model"]


@torch.no_grad()
def test_a_compiled_layer_reads_what_stands_there(fresh_compiler: None):
    plain, model = Model(), Model()
    with accelerate(model):
        step(model)
        for each in (model, plain):
            each.layers[2].compile(backend="eager")
        with calls() as found:
            torch.testing.assert_close(one(model)["last"], one(plain)["last"])
    assert not found


@torch.no_grad()
def test_a_look_leaves_no_trace():
    model, seen = Hooking(), []
    model.part.register_forward_hook(lambda *given: seen.append(given))
    with accelerate(model) as done:
        assert list(done.models) == [""]
        assert not seen
        assert not model.part._buffers
        assert not any(layer._forward_hooks for layer in model.layers)
        assert not model.layers[0].mlp._forward_hooks
        step(model)
    assert len(seen) == 2


@torch.no_grad()
def test_nothing_looks_at_a_model_that_is_observed():
    model = Model()
    with accelerate(model):
        step(model)
        model.marked = object()
        with mock.patch.object(ModelKernel, "look", side_effect=AssertionError("looked")):
            with BaseTorchFunctionMode():
                one(model)
            handle = register_module_forward_hook(lambda *given: None)
            try:
                one(model)
            finally:
                handle.remove()


@torch.no_grad()
def test_what_was_put_off_is_run_where_a_step_ends_early():
    """As plain layers leave it: those before the error have written their position."""
    plain, model = Model(), Model()
    held = []
    with accelerate(model):
        step(model)
        for each in (plain, model):
            cache = Cache(2, Sizes())
            cache.held[..., 5:, :] = torch.nan
            real = type(each.layers[2]).__call__

            def stops(layer: nn.Module, *given: Any, each: Model = each, real: Any = real, **more: Any) -> Any:
                if layer is each.layers[2]:
                    raise KeyboardInterrupt
                return real(layer, *given, **more)

            kernel = each.__dict__.get("forward")
            known = kernel and kernel._known
            opened = mock.patch.object(ModelKernel, "_unchanged", return_value=known) if kernel else nullcontext()
            with mock.patch.object(Layer, "__call__", stops), opened, pytest.raises(KeyboardInterrupt):
                each(inputs_embeds=torch.ones(2, 1, 48), past_key_values=cache)
            held.append(cache)
    assert held[0].lengths == held[1].lengths == [6, 6, 5, 5]
    torch.testing.assert_close(held[1].held, held[0].held, equal_nan=True)


@pytest.mark.parametrize("where", ["room", "kernels"])
@torch.no_grad()
def test_a_cache_that_has_grown_does_not_grow_once_more_when_its_step_is_interrupted(where: str):
    class Full(Cache):
        def make_room(self, indices: Sequence[int], *given: Any) -> Any:
            rooms = super().make_room(indices[: 2 if where == "room" else None], *given)
            if where == "room":
                raise KeyboardInterrupt
            return rooms

    model, cache = Model(), Full(2, Sizes())
    with accelerate(model):
        step(model)
        with (
            mock.patch.object(cpu_decoder.DecoderLayers, "__call__", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(inputs_embeds=torch.ones(2, 1, 48), past_key_values=cache)
    assert cache.lengths == ([6, 6, 5, 5] if where == "room" else [6] * LAYERS)


@torch.no_grad()
def test_rows_that_nobody_waited_for_are_an_error():
    model = Model()
    with accelerate(model):
        step(model)
        real = type(model).between
        with (
            mock.patch.object(Model, "between", lambda model, x: real(model, x).clone()),
            pytest.raises(RuntimeError, match="another order"),
        ):
            step(model)
        step(model)


@torch.no_grad()
def test_other_threads_may_look_meanwhile():
    """They drop what was watched before: each call goes by what it saw first."""
    model = Model()
    with accelerate(model):
        expected = one(model)["last"]
        kernels = [part.__dict__["forward"] for part in (model, *model.layers)]
        kernels[0]._known._found = None
        watches = [kernel._watch for kernel in kernels[1:]]
        seen = [(ModelKernel, "_known", [kernels[0]._known]), (LayerKernel, "_watch", watches)]
        with ExitStack() as stack:
            for kind, name, values in seen:
                read = mock.PropertyMock(side_effect=values)
                stack.enter_context(mock.patch.object(kind, name, read, create=True))
            assert torch.equal(one(model)["last"], expected)


BAD: dict[str, Callable[[list[Any]], Any]] = {  # of the arguments of one layer
    "no tuple": list,
    "too few": lambda layer: tuple(layer[:-1]),
    "none": lambda layer: (),
    "no number": lambda layer: ("4", *layer[1:]),
    "no heads": lambda layer: (0, *layer[1:]),
    "more heads": lambda layer: (6, *layer[1:]),
    "huge": lambda layer: (1 << 62, *layer[1:]),
    "odd heads": lambda layer: (*layer[:2], 15, *layer[3:]),
    "no feed": lambda layer: (*layer[:3], 0, *layer[4:]),
    "another activation": lambda layer: (*layer[:4], 3, *layer[5:]),
    "no gain": lambda layer: (*layer[:6], None, *layer[7:]),
    "no panels": lambda layer: (*layer[:9], None, *layer[10:]),
    "short panels": lambda layer: (*layer[:9], layer[9][:-1], *layer[10:]),
    "another dtype of panels": lambda layer: (*layer[:10], 7, *layer[11:]),
    "given nothing": lambda layer: (*layer[:24], 1, *layer[25:]),
    "given less than nothing": lambda layer: (*layer[:24], -1, *layer[25:]),
    "no keys": lambda layer: (*layer[:25], None, *layer[26:]),
    "no positions": lambda layer: (*layer[:25], layer[25][:, :, :0], layer[26][:, :, :0], *layer[27:]),
    "other positions": lambda layer: (*layer[:25], layer[25][:, :, 1:], *layer[26:]),
    "other rows": lambda layer: (*layer[:25], layer[25][:1], *layer[26:]),
}
BAD_GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "angles": lambda cos, sin: (cos[..., :8].contiguous(), sin, None),
    "a mask of others": lambda cos, sin: (cos, sin, torch.ones(2, 1, 1, 3).bool()),
    "no angles": lambda cos, sin: (None, sin, None),
    "two of three": lambda cos, sin: (cos, sin),
    "no tuple given": lambda cos, sin: [cos, sin, None],
}
BAD_POSITIONS = {"none": 0, "more than there is room for": 7, "a fraction": 0.5}


@pytest.mark.parametrize(
    "bad", [*BAD, *BAD_GIVEN, *BAD_POSITIONS, "no layer", "no tuple of layers", "not read", "queries", "y", "many rows"]
)
@torch.no_grad()
def test_bad_arguments_are_one_error_and_nothing_is_written(bad: str):
    model, seen = Model(), []

    class Seen(cpu_decoder.DecoderLayers):
        def __init__(self, x: Tensor, layers: Any) -> None:
            seen.append(tuple(layers))
            super().__init__(x, seen[-1])

        def __call__(self, *given: Any) -> bool:
            seen.append(given)
            return True

    with accelerate(model), mock.patch.object(cpu_decoder, "DecoderLayers", Seen):
        step(model)
    layers, (x, y, given) = seen[:2]
    native, isa = cpu_decoder._native(), cpu_decoder._isa()
    queries, before = torch.empty(2 * 64), layers[0][25].clone()
    y.fill_(5)
    if bad in BAD:
        layers = (layers[0], BAD[bad](list(layers[1])), *layers[2:])
    if bad in BAD_GIVEN:
        given = BAD_GIVEN[bad](*given[:2])
    if bad == "no layer":
        layers = ()
    if bad == "many rows":
        x, y = x[:1].expand(17, 1, -1).contiguous(), torch.full((17, 1, 48), 5.0)
    queries = queries[:-1] if bad == "queries" else queries
    y = y[..., :-1] if bad == "y" else y

    def run() -> None:
        read = native.read_decoder_layers(isa, 2, 48, list(layers) if bad == "no tuple of layers" else layers)
        read = object() if bad == "not read" else read
        native.decoder_layers(isa, 2, x, y, queries, given, BAD_POSITIONS.get(bad, -1), read)

    with pytest.raises((TypeError, ValueError, RuntimeError)):
        run()
    assert torch.equal(layers[0][25] if layers else before, before)
    assert bool((y == 5).all())
