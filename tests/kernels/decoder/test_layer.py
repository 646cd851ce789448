"""Decoder layers that run one position as two kernels: the same results, which layers do, and what undoes it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import FrozenLinear, accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import kernels as decoder_kernels
from recmas_kernels.decoder import parts as decoder_parts
from recmas_kernels.decoder.layer import LayerKernel
from recmas_kernels.testing import LOW_PRECISION
from tests.kernels.cpu_settings import AVAILABLE, guarded_allocations, instruction_set, threads
from tests.kernels.decoder import layers as decoder_layers
from tests.kernels.decoder.layers import (
    ACTIVATIONS,
    OTHERS,
    Attention,
    ByIndex,
    Cache,
    FeedForward,
    Layer,
    OfType,
    QuickGelu,
    Sizes,
    Step,
    variant,
)
from tests.kernels.frozen import error, make_linear
from tests.kernels.rms_norms import Norm

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of these tests count as those of models whose code was read."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in (Layer, *OTHERS.values())}
    monkeypatch.setattr(decoder_parts, "KNOWN", names)


ROUNDINGS = 16  # of values between the operators, which a plain 16-bit layer makes and the kernels do not
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": True, "sizes": Sizes(features=40, heads=3, key_heads=1, head=22, hidden=50)},
    "qwen3": {"head_norms": True, "activation": ACTIVATIONS["gelu"]},
    "gemma3": {"head_norms": True, "more_norms": True, "offset": 1.0, "activation": ACTIVATIONS["tanh"]},
    "many heads": {"sizes": Sizes(features=130, heads=6, key_heads=6, head=70, hidden=300)},
    "many heads that share": {"sizes": Sizes(heads=22, key_heads=2, head=10, hidden=40)},
}


def made(kind: str = "llama", layer: type[Layer] = Layer, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    return layer(**KINDS[kind]).to(dtype)


def step_of(kind: str, rows: int, before: int = 9, masked: bool = True) -> Step:
    return Step.random(rows, before, masked, KINDS[kind].get("sizes"))


class Served:
    """Counts the calls that the kernels served."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Served:
        real = decoder_kernels.run

        def counted(*arguments: Any) -> Tensor:
            self.count += 1
            return real(*arguments)

        self._patch = mock.patch.object(decoder_kernels, "run", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_position_is_that_of_the_plain_layer(isa: str, dtype: torch.dtype, kind: str):
    """Against float64; a 16-bit layer at least as near to it as plain torch, but for roundings of the result."""
    layer, exact_layer = made(kind, dtype=dtype), made(kind, dtype=dtype).double()
    with instruction_set(isa), accelerate(layer) as done, threads(2):
        assert list(done.layers) == [""]
        for rows, before, masked in ((1, 0, False), (1, 40, True), (3, 17, True), (16, 9, True), (7, 33, False)):
            step = step_of(kind, rows, before, masked).to(dtype)
            exact, expected = step.to(torch.float64).run(exact_layer)
            with Served() as served, guarded_allocations():
                found, cache = step.run(layer)
            assert served.count == cache.updates == 1
            bound = ROUNDINGS * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
            assert error(found, exact) <= bound
            assert error(cache.keys, expected.keys) <= bound
            assert error(cache.values, expected.values) <= bound


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("every", [1, 2])
@torch.no_grad()
def test_float32_rows_beside_weights_that_16_bits_hold(isa: str, every: int):
    """All weights or every second one: AMX splits rows that only bfloat16 panels multiply."""
    layer = made("many heads")
    for linear in [part for part in layer.modules() if isinstance(part, nn.Linear)][::every]:
        linear.weight.data = linear.weight.data.bfloat16().float()
    exact_layer = copy.deepcopy(layer).double()
    with instruction_set(isa), accelerate(layer), threads(2):
        for rows in (8, 9, 16):
            step = step_of("many heads", rows)
            exact, _ = step.to(torch.float64).run(exact_layer)
            with Served() as served, guarded_allocations():
                found, _ = step.run(layer)
            assert served.count == 1
            assert error(found, exact) <= (ROUNDINGS + 64) * torch.finfo(torch.float32).eps


@torch.no_grad()
def test_bits_do_not_depend_on_threads_or_on_the_other_rows():
    layer, step = made("gemma3"), step_of("gemma3", 5)
    with accelerate(layer):
        with threads(1):
            one, _ = step.run(layer)
        with threads(2):
            two, _ = step.run(layer)
        assert torch.equal(one, two)
        step.x[2:], step.keys[2:] = 3.0, -1.0
        others, _ = step.run(layer)
        assert torch.equal(others[:2], one[:2])
        assert not torch.equal(others[2:], one[2:])


@torch.no_grad()
def test_any_strides_of_the_cache_and_of_the_rows_will_do():
    layer, step = made(), step_of("llama", 3)
    with accelerate(layer):
        expected, _ = step.run(layer)
        room = torch.full((3, 2, 40, 32), torch.nan)

        class Roomy(Cache):
            def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
                held = super().update(keys, values, index)
                for part, states in zip(room.split(16, dim=3), held, strict=True):
                    part[:, :, : states.shape[2]] = states
                return tuple(part[:, :, : held[0].shape[2]] for part in room.split(16, dim=3))

        found, _ = step.run(layer, past_key_values=Roomy(step.keys, step.values))
        assert torch.equal(found, expected)
        step.x = torch.stack((step.x, step.x), dim=-1)[..., 0]
        step.turned = tuple(angles.transpose(0, 2).contiguous().transpose(0, 2) for angles in step.turned)
        with Served() as served:
            found, _ = step.run(layer)
        assert torch.equal(found, expected)
        assert served.count == 1


@torch.no_grad()
def test_one_row_of_angles_and_of_the_mask_serves_all_rows():
    layer, step = made(), step_of("llama", 4)
    step.turned = tuple(angles[:1] for angles in step.turned)
    step.mask = step.mask[:1]
    expected, _ = step.run(layer)
    with accelerate(layer), Served() as served:
        found, _ = step.run(layer)
    torch.testing.assert_close(found, expected)
    assert served.count == 1


@pytest.mark.parametrize("isa", AVAILABLE)
@torch.no_grad()
def test_values_that_are_not_finite_spread_as_in_plain_torch(isa: str):
    layer, step = made(), step_of("llama", 3)
    step.x[0, 0, 5] = torch.nan
    step.keys[1, 1, 2, 3] = torch.nan
    step.mask[1, ..., 2] = True
    expected, _ = step.run(layer)
    with instruction_set(isa), accelerate(layer), Served() as served:
        found, _ = step.run(layer)
    assert served.count == 1
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2], expected[2])


@torch.no_grad()
def test_a_row_that_attends_to_nothing_gets_zeros_from_attention():
    layer, step = made(), step_of("llama", 2)
    step.mask[0] = False
    expected, _ = step.run(layer)
    with accelerate(layer):
        found, _ = step.run(layer)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_of_another_formula_run_as_they_are(other: str, scale: float, dtype: torch.dtype):
    """However little of it shows with the weights of today."""
    layer = made(layer=OTHERS[other], dtype=dtype)
    for weight in layer.parameters():
        weight.mul_(scale)
    with accelerate(layer) as done:
        assert not done.layers
        assert "forward" not in layer.__dict__


@torch.no_grad()
def test_a_rule_for_some_layers_or_types_is_found(monkeypatch: pytest.MonkeyPatch):
    kinds = {name: variant(kind) for name, kind in (("index", ByIndex), ("type", OfType))}
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds.values()}
    monkeypatch.setattr(decoder_parts, "KNOWN", names)
    model = nn.ModuleList([made(layer=kinds["index"]) for _ in range(3)])
    for at, layer in enumerate(model):
        layer.self_attn.layer_idx = at
    with accelerate(model) as done:
        assert list(done.layers) == ["0"]
    for dtype, served in ((torch.float32, 1), (torch.bfloat16, 0), (torch.float16, 0)):
        with accelerate(made(layer=kinds["type"], dtype=dtype)) as done:
            assert len(done.layers) == served


@torch.no_grad()
def test_layers_of_unknown_classes_and_layers_that_train_run_as_they_are(monkeypatch: pytest.MonkeyPatch):
    with accelerate(made().train()) as done:
        assert not done.layers
    monkeypatch.setattr(decoder_parts, "KNOWN", set())
    with accelerate(made()) as done:
        assert not done.layers


@torch.no_grad()
def test_accelerating_draws_nothing_and_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch):
    model = nn.ModuleList([made(), made()])
    monkeypatch.setattr(torch, "manual_seed", lambda *_: pytest.fail("a seed was set"))
    state = torch.get_rng_state()
    for layer in model:
        layer.table = numpy.arange(3)  # two of them cannot be compared
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), accelerate(model) as done:
            assert len(done.layers) == 2
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(LayerKernel, "look", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(model)
    assert not any(isinstance(part, FrozenLinear) or "forward" in part.__dict__ for part in model.modules())


@torch.no_grad()
def test_a_model_that_nobody_holds_is_gone_at_once():
    layer, step = made(), step_of("llama", 1)
    accelerate(layer)
    step.run(layer)
    gone = weakref.ref(layer), weakref.ref(layer.mlp.up_proj.panels)
    gc.disable()
    try:
        del layer
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


@torch.no_grad()
def test_a_layer_that_changes_all_the_time_runs_as_its_class_says():
    layer, step = made(), step_of("llama", 1)
    expected, _ = step.run(layer)
    with accelerate(layer), Served() as served:
        for count in range(20):
            layer.self_attn.seen = count
            torch.testing.assert_close(step.run(layer)[0], expected)
        before = served.count
        step.run(layer)
    assert served.count == before


@torch.no_grad()
def test_writes_into_a_packed_weight_are_found(monkeypatch: pytest.MonkeyPatch):
    layer, step = made(), step_of("llama", 1)
    monkeypatch.setenv("RECMAS_CHECK", "1")
    with accelerate(layer):
        step.run(layer)
        layer.mlp.up_proj._parameters["weight"].data[0, 0] = 1.0
        with pytest.raises(RuntimeError, match="written while it is packed"):
            step.run(layer)


class Odd(torch.Tensor):
    """Of a cache that returns tensors of its own kind."""


ODD: dict[str, Callable[[Step], dict[str, Any]]] = {
    "keys of a subclass": lambda step: {"past_key_values": OddCache(step.keys.as_subclass(Odd), step.values)},
    "keys negated": lambda step: {"past_key_values": OddCache(torch._neg_view(-step.keys), step.values)},
    "a mask for all positions": lambda step: {"attention_mask": torch.ones(2, 1, 1, 1, dtype=torch.bool)},
    "angles negated": lambda step: {"position_embeddings": tuple(torch._neg_view(-angles) for angles in step.turned)},
}


class OddCache(Cache):
    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        kind, negated = type(self.keys), self.keys.is_neg()
        keys, values = super().update(keys, values, index)
        return (torch._neg_view(-keys) if negated else keys.as_subclass(kind)), values


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_tensors_that_the_kernels_cannot_read_give_the_plain_result(odd: str, kind: str):
    layer, step = made(kind), step_of(kind, 2)
    expected, _ = step.run(layer, **ODD[odd](step))
    with accelerate(layer):
        found, _ = step.run(layer, **ODD[odd](step))
    torch.testing.assert_close(found.as_subclass(Tensor), expected.as_subclass(Tensor))


@torch.no_grad()
def test_layers_with_other_parts_run_as_they_are():
    def changed(change: Callable[[Layer], Any]) -> Layer:
        layer = made("qwen3")
        change(layer)
        return layer

    changes: dict[str, Callable[[Layer], Any]] = {
        "activation": lambda layer: setattr(layer.mlp, "act_fn", QuickGelu()),
        "part more": lambda layer: layer.self_attn.add_module("gate", nn.Linear(4, 4).requires_grad_(False)),
        "norm of the whole width": lambda layer: setattr(layer.self_attn, "q_norm", Norm(64)),
        "learns": lambda layer: layer.mlp.up_proj.requires_grad_(True),
        "norm learns": lambda layer: layer.input_layernorm.requires_grad_(True),
        "hook": lambda layer: layer.mlp.down_proj.register_forward_hook(lambda *_: None),
        "float64": lambda layer: layer.mlp.double(),
        "no index": lambda layer: delattr(layer.self_attn, "layer_idx"),
    }
    for name, change in changes.items():
        with accelerate(changed(change)) as done:
            assert not done.layers, name


def two_positions(layer: Layer, step: Step) -> Any:
    turned = tuple(angles.repeat(1, 2, 1) for angles in step.turned)
    return Step(step.x.repeat(1, 2, 1), turned, None, step.keys, step.values).run(layer)


CALLS: dict[str, Callable[[Layer, Step], Any]] = {
    "two positions": two_positions,
    "17 rows": lambda layer, step: step_of("llama", 17).run(layer),
    "a mask of each head": lambda layer, step: step.run(layer, attention_mask=step.mask.expand(-1, 4, -1, -1)),
    "gradients": lambda layer, step: step.run(layer),
    "a profiler": lambda layer, step: step.run(layer),
    "autocast": lambda layer, step: step.run(layer),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_calls_run_as_the_layer_says(call: str):
    layer, step = made(), step_of("llama", 2)
    context: dict[str, Any] = {
        "gradients": torch.enable_grad(),
        "a profiler": torch.profiler.profile(),
        "autocast": torch.autocast("cpu"),
    }
    run = CALLS[call]
    with torch.no_grad(), context.get(call, torch.no_grad()):
        expected, _ = run(layer, step)
        with accelerate(layer), Served() as served:
            found, cache = run(layer, step)
    assert served.count == 0
    assert cache.updates == 1
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if call == "autocast" else 1e-5, atol=1e-2 if call == "autocast" else 1e-5
    )


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(sizes), requires_grad=False)


CHANGES: dict[str, Callable[[Layer], Any]] = {
    "scale": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "eps": lambda layer: setattr(layer.post_attention_layernorm, "eps", 0.5),
    "activation": lambda layer: setattr(layer.mlp, "act_fn", QuickGelu()),
    "child": lambda layer: setattr(layer.mlp, "up_proj", make_linear(48, 80)),
    "weight": lambda layer: setattr(layer.mlp.up_proj, "weight", parameter(80, 48)),
    "data": lambda layer: setattr(layer.mlp.up_proj._parameters["weight"], "data", torch.ones(80, 48)),
    "bias": lambda layer: layer.mlp.up_proj.register_parameter("bias", parameter(80)),
    "gain": lambda layer: setattr(layer.input_layernorm, "weight", parameter(48)),
    "gain in place": lambda layer: layer.input_layernorm.weight.fill_(0.5),
    "read": lambda layer: layer.self_attn.k_proj.weight.mul_(2),
    "hook": lambda layer: layer.mlp.register_forward_hook(lambda module, x, y: 2 * y),
    "hook before": lambda layer: layer.self_attn.o_proj.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
    "global hook": lambda layer: None,
    "forward": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "class": lambda layer: setattr(layer.mlp, "__class__", Doubled),
    "hooks replaced": lambda layer: put_hook(layer.mlp),
    "parameters replaced": lambda layer: setattr(layer.input_layernorm, "_parameters", {"weight": parameter(48)}),
    "children replaced": lambda layer: setattr(
        layer.mlp, "_modules", {**layer.mlp._modules, "up_proj": make_linear(48, 80)}
    ),
    "dictionary replaced": lambda layer: setattr(
        layer.self_attn, "__dict__", {**layer.self_attn.__dict__, "scaling": 0.5}
    ),
    "packed again": lambda layer: pack_again(layer.mlp.up_proj),
    "gain negated": lambda layer: setattr(layer.input_layernorm.weight, "data", torch._neg_view(parameter(48).data)),
    "gain of strides": lambda layer: setattr(layer.input_layernorm.weight, "data", torch.ones(48, 3)[:, 0]),
    "removed norm": lambda layer: setattr(layer, "input_layernorm", nn.Identity()),
}


def put_hook(module: nn.Module) -> None:
    module._forward_hooks = OrderedDict()
    module.register_forward_hook(lambda module, x, y: 2 * y)


_HELD = []


def pack_again(linear: nn.Linear) -> None:
    """While somebody holds what it was packed in before."""
    _HELD.append(getattr(linear, "panels", None))
    linear.weight.mul_(3)
    if isinstance(linear, FrozenLinear):
        linear.pack()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_layer_changed_meanwhile_computes_what_it_is_now(change: str):
    layer, plain, step = made(), made(), step_of("llama", 2)
    with accelerate(layer):
        before, _ = step.run(layer)
        for each in (layer, plain):
            CHANGES[change](each)
        hook = None
        if change == "global hook":
            hook = nn.modules.module.register_module_forward_hook(
                lambda module, x, y: 2 * y if isinstance(module, nn.Linear) else None
            )
        try:
            (found, cache), (expected, _) = step.run(layer), step.run(plain)
        finally:
            if hook is not None:
                hook.remove()
    assert cache.updates == 1
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", ["function of its file", "method", "forward", "call"])
@torch.no_grad()
def test_code_patched_meanwhile_is_what_runs(place: str, monkeypatch: pytest.MonkeyPatch):
    layer, step = made(), step_of("llama", 2)
    with accelerate(layer):
        before, _ = step.run(layer)
        if place == "function of its file":
            monkeypatch.setattr(decoder_layers, "halves", lambda x: x.chunk(2, dim=-1)[::-1])
        elif place == "method":
            monkeypatch.setattr(Attention, "scores", lambda self, scores: 2 * scores)
        elif place == "forward":
            monkeypatch.setattr(Norm, "forward", lambda self, x: x)
        else:
            monkeypatch.setattr(FeedForward, "__call__", lambda self, x: x)
        found, _ = step.run(layer)
    expected, _ = step.run(layer)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_functions_of_torch_that_are_replaced_meanwhile_are_called():
    layer, step = made(), step_of("llama", 2)
    with accelerate(layer), Served() as served:
        step.run(layer)
        with mock.patch.object(F, "silu", lambda x, inplace=False: x.relu()):
            found, _ = step.run(layer)
    with mock.patch.object(F, "silu", lambda x, inplace=False: x.relu()):
        torch.testing.assert_close(found, step.run(layer)[0])
    assert served.count == 1


@torch.no_grad()
def test_hooks_of_the_layer_itself_are_called():
    layer, step, seen = made(), step_of("llama", 2), []
    layer.register_forward_hook(lambda module, x, y: seen.append(y))
    with accelerate(layer), Served() as served:
        found, _ = step.run(layer)
    assert served.count == 1
    assert seen[0] is found


@torch.no_grad()
def test_weights_are_let_go_with_the_layers_that_held_them():
    layer, step = made(), step_of("llama", 1)
    with accelerate(layer):
        step.run(layer)
        step.run(layer)
        panels = weakref.ref(layer.mlp.up_proj.panels)
        layer.mlp.up_proj.unpack()
        gc.collect()
        assert panels() is None
        found, _ = step.run(layer)
        layer.mlp.up_proj.pack()
        step.run(layer)  # looks again
        with Served() as served:
            again, _ = step.run(layer)
        assert served.count == 1
    torch.testing.assert_close(found, again)


@torch.no_grad()
def test_copies_and_files_of_a_layer_are_plain():
    layer, step = made(), step_of("llama", 2)
    expected, _ = step.run(layer)
    with accelerate(layer):
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            with Served() as served:
                assert torch.equal(step.run(copied)[0], expected)
            assert served.count == 0
            with accelerate(copied) as done:
                assert list(done.layers) == [""]


@torch.no_grad()
def test_a_layer_that_two_accelerate_is_plain_after_both():
    layer, step = made(), step_of("llama", 1)
    first, second = accelerate(layer), accelerate(layer)
    first.close()
    step.run(layer)  # looks again
    with Served() as served:
        step.run(layer)
    assert served.count == 1
    second.close()
    assert "forward" not in layer.__dict__


@torch.no_grad()
def test_layers_alike_are_proved_once_and_others_by_themselves():
    model = nn.ModuleList([made(), made(), made("qwen3"), made()])
    model[1].self_attn.layer_idx = 1
    model[3].self_attn.scaling = 1.0
    calls = []
    real = decoder.layer_output
    with mock.patch.object(decoder, "layer_output", lambda *a: calls.append(1) or real(*a)):
        with accelerate(model) as done:
            assert len(done.layers) == 4
        assert len(calls) == 3 * 2 + 1  # three formulas with and without a mask, and the second layer of the first


@torch.no_grad()
def test_several_threads_run_one_layer():
    layer = made()
    steps = [step_of("llama", rows) for rows in (1, 2, 3, 4)]
    with accelerate(layer):
        expected = [step.run(layer)[0] for step in steps]
        faults: list[int] = []

        def work(at: int) -> None:
            with torch.no_grad():
                for _ in range(50):
                    if not torch.equal(steps[at].run(layer)[0], expected[at]):
                        faults.append(at)

        workers = [threading.Thread(target=work, args=(at,)) for at in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not faults


@torch.no_grad()
def test_compiled_layers_run_as_their_class_says(fresh_compiler: None):
    layer, step = made(), step_of("llama", 1)
    expected, _ = step.run(layer)
    with accelerate(layer), Served() as served:
        compiled = torch.compile(layer, backend="eager")
        torch.testing.assert_close(compiled(step.x, **_given(step)), expected)
    assert served.count == 0


def _given(step: Step) -> dict[str, Any]:
    return {
        "attention_mask": step.mask,
        "position_embeddings": step.turned,
        "past_key_values": Cache(step.keys, step.values),
    }
