"""Decoders whose layers run in one call: the same bits as layer by layer, as the model is now."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.decoder.layer import LayerKernel
from recmas_kernels.decoder.model import ModelKernel
from recmas_kernels.testing import LOW_PRECISION
from tests.kernels.cpu_settings import AVAILABLE, guarded_allocations, instruction_set, threads
from tests.kernels.decoder.layers import Layer, Sizes
from tests.kernels.decoder.models import (
    LAYERS,
    Cache,
    Doubled,
    Model,
    Twice,
    WithoutRoom,
    calls,
    counted_as_known,
    one,
    step,
)

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
known = counted_as_known

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": True, "sizes": Sizes(features=40, heads=3, key_heads=1, head=22, hidden=50)},
    "gemma3": {"head_norms": True, "more_norms": True, "offset": 1.0},
}


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
