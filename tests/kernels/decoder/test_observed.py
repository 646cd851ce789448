"""Decoders whose layers run in one call: whoever looks between layers sees what stands there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import BaseTorchFunctionMode

from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.decoder.model import ModelKernel
from recmas_kernels.decoder.run import Known
from tests.kernels.decoder.layers import Layer
from tests.kernels.decoder.models import LAYERS, Hooking, Model, calls, counted_as_known, one, step

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
known = counted_as_known


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
