"""Whoever observes ops sees every one of them, though calls that nobody observes leave the dispatcher out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recmas_kernels import FusedRecursiveLink, ops, recursive_link, serve
from recmas_kernels.backends import tensors
from recmas_kernels.testing import make_link, make_rows

FORWARD, TRAINING = "recmas::link_fwd", ["recmas::link_fwd_train", "recmas::link_bwd"]


@pytest.fixture
def link() -> FusedRecursiveLink:
    return make_link(FusedRecursiveLink.inner(8).config)


def train(link: FusedRecursiveLink) -> torch.Tensor:
    y = link(make_rows(3, 8))
    y.backward(torch.ones_like(y))
    return y


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def ours(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("recmas::")]


@pytest.mark.skipif(tensors._native() is None, reason="needs recmas_kernels._tensors")
def test_nobody_observing_leaves_the_dispatcher_out(link, monkeypatch):
    called = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: called.append(name) or run(*args)

    for name in (FORWARD, *TRAINING):
        op = name.removeprefix("recmas::")
        monkeypatch.setattr(serve, op, noting(name, getattr(serve, op)))
        monkeypatch.setattr(ops, op, None)  # the op itself cannot be called
    train(link)
    with torch.no_grad():
        link(make_rows(3, 8))
        link(make_rows(3, 8)[None])
    assert called == [*TRAINING, FORWARD, FORWARD]


def test_the_direct_way_gives_the_same_bits(link):
    x = make_rows(5, 8)
    with torch.no_grad():
        direct = link(x)
        with Seen():
            assert torch.equal(link(x), direct)
    y = train(link)
    grads = [parameter.grad.clone() for parameter in link.parameters()]
    link.zero_grad()
    with Seen():
        assert torch.equal(train(link), y)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(link.parameters(), grads, strict=True))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes(link, mode):
    """Of functions, the module sees none: it calls its layers, whose functions the mode may replace."""
    w1, w2 = link.proj1.weight, link.proj2.weight
    with mode() as seen, torch.no_grad():
        recursive_link(make_rows(3, 8), w1, w2)
    assert ours(seen.names) == [FORWARD]
    with mode() as seen:
        y = recursive_link(make_rows(3, 8), w1, w2)
    assert ours(seen.names) == TRAINING[:1]
    with Seen() as seen_backward:  # torch shows backward passes to no function mode
        y.backward(torch.ones_like(y))
    assert ours(seen_backward.names) == TRAINING[1:]


def test_flop_counters(link):
    """The counter's own hooks make a module call its layers; the function's op is seen."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.recmas.link_fwd: lambda *_, **__: 7})
    with counter, torch.no_grad():
        recursive_link(make_rows(3, 8), make_rows(8, 8), make_rows(8, 8, seed=2))
    assert counter.get_total_flops() == 7


def test_fake_tensors_inside_and_outside_of_their_mode(link):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(make_rows(3, 8))
        assert link(x).shape == (3, 8)
    assert type(link(x)) is type(x)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx(link, tracing, pre_dispatch):
    x = make_rows(3, 8)
    with torch.no_grad():
        graph = make_fx(link, tracing_mode=tracing, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(x)
        assert torch.ops.recmas.link_fwd.default in {node.target for node in graph.graph.nodes}
        torch.testing.assert_close(graph(x), link(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_export(link):
    x = make_rows(3, 8)
    for strict in (False, True):
        exported = torch.export.export(link.eval().requires_grad_(False), (x,), strict=strict)
        assert torch.ops.recmas.link_fwd.default in {node.target for node in exported.graph.nodes}
        torch.testing.assert_close(exported.module()(x), link(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(link, dynamic):
    compiled = torch.compile(link, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        x, twin = (make_rows(tokens, 8).requires_grad_() for _ in range(2))
        compiled(x).square().sum().backward()
        link(twin).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), link(x))


def test_jit_trace(link):
    x = make_rows(3, 8)
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(link, (x,))
    assert "recmas::link_fwd" in str(traced.graph)
    torch.testing.assert_close(traced(x), link(x))


def test_profilers(link):
    with profile() as profiler:
        train(link)
        with torch.no_grad():
            link(make_rows(3, 8))
    assert {FORWARD, *TRAINING} <= {event.key for event in profiler.key_averages()}


class Wrapper(torch.Tensor):
    """A subclass whose own memory means nothing."""

    inner: torch.Tensor
    seen: list[str]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner, self.seen = inner, []
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for wrapper in (value for value in args if isinstance(value, cls)):
            wrapper.seen.append(func.name())
        return func(*(value.inner if isinstance(value, cls) else value for value in args), **(kwargs or {}))


@pytest.mark.parametrize("place", ["x", "w2", "b1"])
def test_subclasses(place):
    tensors = {"x": make_rows(3, 8), "w1": make_rows(8, 8), "w2": make_rows(8, 8, seed=2), "b1": make_rows(1, 8)[0]}
    expected = recursive_link(**tensors)
    wrapper = tensors[place] = Wrapper(tensors[place])
    assert torch.equal(recursive_link(**tensors), expected)
    assert FORWARD in wrapper.seen


@pytest.mark.parametrize("width", [1, 8])
def test_negated_views(width):
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    rows = torch.complex(make_rows(3, width), make_rows(3, width, seed=2)).conj().imag
    assert rows.is_neg()
    w1, w2, b1 = make_rows(5, width), make_rows(width, 5, seed=2), torch.complex(*[make_rows(1, 5)[0]] * 2).conj().imag
    expected = recursive_link(rows.clone().resolve_neg(), w1, w2, b1.clone().resolve_neg())
    assert torch.equal(recursive_link(rows, w1, w2, b1), expected)


def test_negated_views_with_any_stride(link):
    rows = make_rows(3, 8)
    assert torch.equal(link(torch._neg_view(rows)), link(-rows))


@pytest.mark.parametrize("kind", ["zero", "negated", "expanded"])
def test_gradients_that_are_not_the_memory_they_seem_to_be(link, kind):
    inputs, rows = tuple(link.parameters()), make_rows(3, 8, seed=2)
    dy, plain = {
        "zero": (torch._efficientzerotensor((3, 8)), torch.zeros(3, 8)),
        "negated": (torch._neg_view(rows), -rows),
        "expanded": (rows[:1].expand(3, 8), rows[:1].repeat(3, 1)),
    }[kind]
    found, expected = (torch.autograd.grad(link(make_rows(3, 8)), inputs, grad) for grad in (dy, plain))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_batches_of_gradients(link):
    inputs, dys = tuple(link.parameters()), make_rows(6, 8, seed=2).view(2, 3, 8)
    y = link(make_rows(3, 8))
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for index, dy in enumerate(dys):
        alone = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        assert all(torch.equal(one[index], other) for one, other in zip(batched, alone, strict=True))


def test_tensors_without_memory_are_left_to_the_reference():
    link = FusedRecursiveLink.inner(8).requires_grad_(False)
    assert link.to("meta")(torch.empty(3, 8, device="meta")).shape == (3, 8)
