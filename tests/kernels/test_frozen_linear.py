"""`FrozenLinear` in its parameter's life: read, replaced, trained, parametrised, moved, copied, compiled."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from recmas_kernels import FrozenLinear, accelerate, explain
from recmas_kernels.backends import cpu
from recmas_kernels.testing import make_rows
from tests.kernels.frozen import make_linear

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def pair() -> tuple[nn.Linear, FrozenLinear]:
    """A plain frozen layer and its packed twin."""
    frozen = FrozenLinear.from_linear(make_linear())
    assert frozen.packed() is not None
    return make_linear(), frozen


def saved(frozen: FrozenLinear) -> FrozenLinear:
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded: FrozenLinear = torch.load(file, weights_only=False)
    return loaded


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ReadsWeight(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.linear.weight.T


def assigned(module: nn.Module) -> None:
    module.weight = nn.Parameter(make_rows(53, 37, seed=9))


def swapped(module: nn.Module) -> None:
    module.weight.data = make_rows(53, 37, seed=9)


def swapped_unseen(module: nn.Module) -> None:
    next(iter(module.parameters())).data = make_rows(53, 37, seed=9)


def written(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(3)


def written_in_a_device_context(module: nn.Module) -> None:
    with torch.device("cpu"):
        written(module)


def written_under_a_profiler(module: nn.Module) -> None:
    with torch.profiler.profile():
        written(module)


def written_under_a_mode(module: nn.Module) -> None:
    with FlopCounterMode(display=False):
        written(module)


def in_dictionary(module: nn.Module) -> None:
    module._parameters["weight"] = nn.Parameter(make_rows(53, 37, seed=9))


def seeded(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def run(module: nn.Module) -> None:
        torch.manual_seed(3)
        change(module)

    return run


CHANGES = {
    "assigned": assigned,
    "data replaced": swapped,
    "data of its parameter replaced": swapped_unseen,
    "written": written,
    "written in a device context": written_in_a_device_context,
    "written under a profiler": written_under_a_profiler,
    "written under a mode": written_under_a_mode,
    "put in the dictionary": in_dictionary,
    "parametrized": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "spectral_norm": seeded(lambda module: parametrizations.spectral_norm(module)),
    "spectral_norm of old": seeded(lambda module: spectral_norm(module)),
    "weight_norm": lambda module: parametrizations.weight_norm(module),
    "weight_norm of old": lambda module: weight_norm(module),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "loaded": lambda module: module.load_state_dict(nn.Linear(37, 53).state_dict()),
    "loaded by assignment": lambda module: module.load_state_dict(nn.Linear(37, 53).state_dict(), assign=True),
    "cast": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_changed_weight_is_used_and_kept(change: str):
    """By every way of changing one; and what is unpacked, saved, copied and cast afterwards is the newer one."""
    x, layers = make_rows(4, 37), pair()
    for layer in layers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            CHANGES[change](layer.eval())
    plain, frozen = layers
    torch.testing.assert_close(frozen(x), plain(x))
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())
    assert frozen.state_dict().keys() == state.keys()
    if change != "weight_norm of old":  # which torch does not copy
        torch.testing.assert_close(copy.deepcopy(frozen)(x), plain(x))
    torch.testing.assert_close(frozen.double().float()(x), plain(x))
    frozen.unpack()
    torch.testing.assert_close(frozen(x), plain(x))
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())


def test_functional_call_uses_what_it_is_given_and_leaves_the_layer_packed():
    linear, frozen = pair()
    x = make_rows(3, 37)
    given = {"weight": make_rows(53, 37, seed=4).requires_grad_(), "bias": make_rows(53, seed=5).requires_grad_()}
    for some in (given, {"weight": given["weight"]}):
        expected, found = (functional_call(layer, some, (x,)) for layer in (linear, frozen))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), [*some.values()]) for y in (expected, found)]
        assert all(torch.equal(*both) for both in zip(*gradients, strict=True))
    assert frozen.packed() is not None
    torch.testing.assert_close(frozen(x), linear(x))
    found = functional_call(frozen, dict(frozen.named_parameters()), (x,))
    torch.testing.assert_close(found, linear(x))
    differentiated = torch.func.grad(lambda weights: functional_call(frozen, weights, (x,)).sum())
    with pytest.raises(RuntimeError, match="weight is packed, and what stands for it has no values"):
        differentiated(dict(frozen.named_parameters()))
    torch.testing.assert_close(differentiated(dict(frozen.state_dict()))["bias"], torch.full((53,), 3.0))


def test_a_bias_given_to_a_call_has_its_gradient():
    linear, frozen = pair()
    x, bias = make_rows(3, 37), make_rows(53, seed=5).requires_grad_()
    y = functional_call(frozen, {"bias": bias}, (x,))
    torch.testing.assert_close(y, functional_call(linear, {"bias": bias}, (x,)))
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full((53,), 3.0))


def test_a_bias_of_any_stride():
    linear, frozen = pair()
    x = make_rows(3, 37)
    for bias in (make_rows(106)[::2], make_rows(1).expand(53)):
        given = {"bias": bias}
        torch.testing.assert_close(functional_call(frozen, given, (x,)), functional_call(linear, given, (x,)))


@pytest.mark.parametrize("which", ["module", "weight", "bias"])
def test_what_is_set_to_learn_learns(which: str):
    layers = pair()
    for layer in layers:
        (layer if which == "module" else getattr(layer, which)).requires_grad_(True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            layer(make_rows(5, 37, seed=step)).square().sum().backward()
            optimizer.step()
    plain, frozen = layers
    learned = {key for key in ("weight", "bias") if not torch.equal(getattr(plain, key), getattr(make_linear(), key))}
    assert learned == ({"weight", "bias"} if which == "module" else {which})
    for key in ("weight", "bias"):
        torch.testing.assert_close(getattr(frozen, key), getattr(plain, key))


@pytest.mark.parametrize("transform", ["vmap", "grad", "mode"])
def test_a_layer_that_becomes_plain_in_a_transform_keeps_its_weight(transform: str):
    """No wrapper of the transform, which means nothing after it."""
    linear, frozen = pair()
    x = make_rows(2, 37)
    frozen.requires_grad_(True)
    if transform == "vmap":
        torch.vmap(frozen)(x)
    elif transform == "grad":
        torch.func.grad(lambda rows: frozen(rows).sum())(x)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            frozen.unpack()
    held = frozen._parameters["weight"].data
    assert type(held) is Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(held)
    assert torch.equal(held, linear.weight)
    frozen.requires_grad_(False)
    torch.vmap(lambda rows: (frozen.pack(), frozen(rows))[1])(x)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(frozen.panels.data)
    torch.testing.assert_close(frozen(x), linear(x))


def test_reading_the_weight_makes_the_layer_plain():
    linear, frozen = pair()
    parameter = frozen._parameters["weight"]
    assert parameter.shape == linear.weight.shape
    assert parameter.dtype is linear.weight.dtype
    assert frozen.weight is parameter
    assert frozen.weight is frozen.weight
    assert torch.equal(parameter, linear.weight)
    assert frozen.packed() is None
    assert frozen.pack()
    assert parameter.untyped_storage().nbytes() == 4
    assert parameter.isnan().all()
    with pytest.raises(RuntimeError, match="written-to"):
        parameter.data.add_(1)


def test_a_write_into_a_packed_weight_is_found(monkeypatch: pytest.MonkeyPatch):
    _, frozen = pair()
    monkeypatch.setenv("RECMAS_CHECK", "1")
    frozen(make_rows(1, 37))
    next(frozen.parameters()).data.fill_(1)
    with pytest.raises(RuntimeError, match="weight was written while it is packed"):
        frozen(make_rows(1, 37))


def call(layer: nn.Module, x: Tensor, end: Connection) -> None:
    end.send(layer(x).tolist())


def test_a_packed_layer_is_given_to_a_spawned_process():
    plain, frozen = pair()
    x = make_rows(2, plain.in_features)
    end, other = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=call, args=(frozen, x, other))
    child.start()
    other.close()  # else nobody would notice that the child has failed
    torch.testing.assert_close(torch.tensor(end.recv()), plain(x))
    child.join()
    assert frozen.packed() is not None


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(3), None, r"weight has shape \(3,\), expected two dimensions"),
        ("a", None, "weight is a str, expected a tensor"),
        (torch.ones(3, 4), torch.ones(4), r"bias has shape \(4,\), expected \(3,\)"),
        (torch.ones(3, 4), [1, 2, 3], "bias is a list, expected a tensor"),
    ],
)
def test_a_weight_or_bias_that_does_not_fit_is_named(weight: Any, bias: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        FrozenLinear(weight, bias)


def test_state_copies_and_pickles_leave_the_layer_packed():
    linear, frozen = pair()
    assert torch.equal(frozen.state_dict()["weight"], linear.weight)
    x = make_rows(2, 37)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), saved(frozen)):
        assert copied.packed() is None
        assert torch.equal(copied.weight, linear.weight)
        torch.testing.assert_close(copied(x), linear(x))
        assert copied.pack()
        torch.testing.assert_close(copied(x), linear(x))
        copied.unpack()
        assert torch.equal(copied.weight, linear.weight)
    assert frozen.packed() is not None


def test_loads_and_casts_pack_again_where_that_can_be():
    _, frozen = pair()
    other = nn.Linear(37, 53)
    frozen.load_state_dict(other.state_dict())
    assert frozen.packed() is not None
    assert torch.equal(frozen.state_dict()["weight"], other.weight)
    assert frozen.double().packed() is None
    assert frozen.float().packed() is not None
    assert torch.equal(frozen.state_dict()["weight"], other.weight)
    assert frozen.to(torch.bfloat16).packed().dtype is torch.bfloat16
    assert frozen.to("meta").weight.device.type == "meta"
    given = nn.Parameter(make_rows(53, 37))
    frozen = pair()[1]
    frozen.load_state_dict({"weight": given, "bias": nn.Parameter(make_rows(53))}, assign=True)
    assert not given.isnan().any()  # somebody else's
    frozen.unpack()
    assert frozen.float().packed() is None


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        linear = make_linear()
        frozen = FrozenLinear.from_linear(linear)
    x = make_rows(3, 37).requires_grad_()
    (dx,) = torch.autograd.grad(frozen(x).sum(), x)
    torch.testing.assert_close(dx[0], linear.weight.sum(dim=0))
    with torch.inference_mode():
        frozen.unpack()
    assert not frozen.weight.is_inference()


def test_compiled(fresh_compiler: None):
    linear, frozen = pair()
    model = nn.Sequential(frozen, nn.Tanh())
    x, dy = make_rows(3, 37).requires_grad_(), make_rows(3, 53)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x).tanh())
    torch.testing.assert_close(*(torch.autograd.grad(run(x), x, dy)[0] for run in (compiled, model)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # what is traced anew is torch's to compile
    assigned(frozen)
    torch.testing.assert_close(compiled(x), model(x))
    model[0] = frozen = FrozenLinear.from_linear(linear)
    torch.testing.assert_close(compiled(x), linear(x).tanh())
    frozen.requires_grad_(True)
    trained = torch.compile(model, backend="aot_eager")
    (gradient,) = torch.autograd.grad(trained(x.detach()).sum(), next(frozen.parameters()))
    expected = torch.autograd.grad(linear.requires_grad_(True)(x.detach()).tanh().sum(), linear.weight)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_packed_layer_is_refused(strict: bool):
    linear, frozen = pair()
    x = make_rows(3, 37)
    for module in (frozen, ReadsWeight(frozen)):
        with pytest.raises(Exception, match=r"packed(.|\n)*unpack"):
            torch.export.export(module, (x,), strict=strict)
    frozen.unpack()
    torch.testing.assert_close(torch.export.export(frozen, (x,), strict=strict).module()(x), linear(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_copies_of_a_compiled_layer_run_their_own_weight():
    _, frozen = pair()
    frozen.compile(backend="eager")
    x = make_rows(2, 37)
    frozen(x)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        twin.weight.data.zero_()
        assert torch.equal(twin(x), twin.bias.expand(2, -1))


def test_a_symbolic_trace_names_the_weight():
    linear, frozen = pair()
    graph = torch.fx.symbolic_trace(nn.Sequential(frozen, nn.Tanh()))
    assert "0.weight" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(make_rows(2, 37)), linear(make_rows(2, 37)).tanh())


def test_a_graph_holds_a_weight_that_was_read():
    linear, frozen = pair()
    x = make_rows(2, 37)
    graph = make_fx(ReadsWeight(frozen))(x)
    torch.testing.assert_close(graph(x), x @ linear.weight.T)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_rows(layout: torch.layout):
    linear, frozen = pair()
    parts = [make_rows(2, 37), make_rows(3, 37, seed=2)]
    found = frozen(torch.nested.nested_tensor(parts, layout=layout))
    for one, part in zip(found.unbind(), parts, strict=True):
        torch.testing.assert_close(one, linear(part))


def test_sparse_rows():
    linear, frozen = pair()
    x = F.dropout(make_rows(3, 37), 0.5)
    torch.testing.assert_close(frozen(x.to_sparse_csr()), linear(x))


def test_who_kept_the_forward_may_call_it_when_the_layer_is_plain_again():
    """As accelerate's hooks do."""
    table = nn.Embedding(53, 37).requires_grad_(False)
    model = nn.Sequential(nn.Linear(37, 53), nn.Linear(37, 53)).requires_grad_(False)
    model[1].weight = table.weight
    x, expected = make_rows(3, 37), [layer(make_rows(3, 37)) for layer in model]
    with accelerate(nn.ModuleList([table, model])) as done:
        assert len(done.packed) == len(done.shared) == 1
        kept = [layer.forward for layer in model]
    assert [type(layer) for layer in model] == [nn.Linear] * 2
    torch.testing.assert_close([run(x) for run in kept], expected)


def test_whoever_asks_for_the_parameters_by_a_state_dict_gets_them():
    _, frozen = pair()
    held = frozen.state_dict(keep_vars=True)
    assert held["weight"] is frozen._parameters["weight"]
    held["weight"].mul_(0)
    assert torch.equal(frozen(make_rows(1, 37))[0], frozen.bias)


class Twice(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return 2 * y if func is F.linear else y


def twice(*args: Any, **kwargs: Any) -> Tensor:
    return 2 * torch._C._nn.linear(*args, **kwargs)


class TwiceOf(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * y.as_subclass(Tensor) if func is F.linear else y


def test_a_function_that_a_mode_or_the_class_of_the_rows_replaces():
    linear, frozen = pair()
    x = make_rows(3, 37)
    with Twice():
        torch.testing.assert_close(frozen(x), linear(x))
        assert "plain torch: serves this call" in explain(frozen, x)
    torch.testing.assert_close(frozen(x.as_subclass(TwiceOf)), 2 * linear(x))
    with mock.patch.object(F, "linear", twice):
        torch.testing.assert_close(frozen(x), linear(x))
    assert frozen.packed() is not None
    given = {"bias": linear.bias.detach().as_subclass(TwiceOf)}
    torch.testing.assert_close(functional_call(frozen, given, (x,)), 2 * linear(x))
    torch.testing.assert_close(frozen(x), linear(x))
    with mock.patch.object(nn.Linear, "forward", lambda self, rows: 2 * F.linear(rows, self.weight, self.bias)):
        torch.testing.assert_close(frozen(x), linear(x))


def test_a_weight_in_shared_memory_is_not_packed():
    _, frozen = pair()
    frozen.share_memory()
    assert frozen.weight.is_shared()
    frozen.weight.data.fill_(1)  # as another process might
    torch.testing.assert_close(frozen(torch.ones(1, 37)), 37 + frozen.bias[None])
    assert frozen.double().float().packed() is not None


def test_explain_says_who_serves():
    frozen = FrozenLinear.from_linear(make_linear())
    assert "cpu: serves this call" in explain(frozen, make_rows(2, 37))
    frozen.unpack()
    assert "plain torch" in explain(frozen, make_rows(2, 37))


def test_floating_point_operations_are_counted_as_of_the_plain_layer():
    found = []
    for layer in pair():
        x = make_rows(6, 37).view(2, 3, 37).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        found.append((counter.get_total_flops(), backward.get_total_flops()))
    assert found[0] == found[1] == (2 * 6 * 37 * 53,) * 2
