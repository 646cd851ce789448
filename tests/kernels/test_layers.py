"""Layers that are not what they seem: a link with one runs its children, gives the eager result and says why."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from recmas_kernels import FusedRecursiveLink, RecursiveLink, explain, fuse, recursive_link
from recmas_kernels.testing import configs, make_link, make_rows

CONFIG = configs()["inner"]
Change = Callable[[RecursiveLink], object]


class LoRA(nn.Linear):
    """As loralib's: a subclass that keeps ``weight``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        torch.manual_seed(3)
        self.down, self.up = nn.Parameter(torch.randn(4, self.in_features)), nn.Parameter(torch.randn(40, 4) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class HalvedIn(nn.Parameter):
    """As quantised weights are: a class whose values are what torch's functions make of them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (F.linear, F.layer_norm):
                args = [value / 2 if type(value) is cls else value for value in args]
            return func(*args, **(kwargs or {}))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Adapter(nn.Module):
    """As PEFT's: the layer inside another one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 1.5


def replace_forward(link: RecursiveLink) -> None:
    """As accelerate does."""
    layer, old = link.proj2, link.proj2.forward
    layer.forward = lambda x: 3 * old(x)  # type: ignore[method-assign]


def swap_class(link: RecursiveLink) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    link.proj1.__class__ = Scaled


def plain_attribute(link: RecursiveLink) -> None:
    """As FSDP's flat parameters leave a weight, and DataParallel's replicas all of them."""
    weight = link.proj1.weight.detach() * 2
    del link.proj1.weight
    link.proj1.weight = weight


def buffer(link: RecursiveLink) -> None:
    weight = link.proj1.weight.detach() * 2
    del link.proj1.weight
    link.proj1.register_buffer("weight", weight)


CHANGES: dict[str, tuple[Change, str]] = {
    "LoRA": (lambda link: setattr(link, "proj1", LoRA(link.proj1)), "proj1 is a .*LoRA"),
    "adapter": (lambda link: setattr(link, "proj2", Adapter(link.proj2)), "proj2 is a .*Adapter"),
    "prune": (lambda link: prune.l1_unstructured(link.proj1, "weight", 0.5), "proj1 has hooks"),
    "weight_norm": (lambda link: parametrizations.weight_norm(link.proj1), "proj1 is a .*Parametrized"),
    "spectral_norm": (lambda link: parametrizations.spectral_norm(link.proj1), "proj1 is a .*Parametrized"),
    "parametrize bias": (
        lambda link: parametrize.register_parametrization(link.proj2, "bias", Doubled()),
        "proj2 is a .*Parametrized",
    ),
    "class": (swap_class, "proj1 is a .*Scaled"),
    "identity": (lambda link: setattr(link, "post_ln", nn.Identity()), "post_ln is a .*Identity"),
    "batch norm": (lambda link: setattr(link, "pre_ln", nn.BatchNorm1d(40)), "pre_ln is a .*BatchNorm1d"),
    "RMSNorm": (lambda link: setattr(link, "pre_ln", nn.RMSNorm(40)), "pre_ln is a .*RMSNorm"),
    "no affine": (
        lambda link: setattr(link, "pre_ln", nn.LayerNorm(40, elementwise_affine=False)),
        "pre_ln has no parameter weight",
    ),
    "no weight": (lambda link: link.post_ln.register_parameter("weight", None), "post_ln has no parameter weight"),
    "eps": (lambda link: setattr(link.pre_ln, "eps", 0.5), "pre_ln and post_ln have different eps: 0.5 and 1e-05"),
    "forward": (replace_forward, "proj2 has a forward of its own"),
    "attribute": (plain_attribute, "proj1 has no parameter weight"),
    "buffer": (buffer, "proj1 has no parameter weight"),
    "class of a weight": (
        lambda link: setattr(link.proj2, "weight", HalvedIn(link.proj2.weight.detach())),
        "proj2.weight is a HalvedIn, which may replace torch's functions",
    ),
    "class of a bias": (
        lambda link: setattr(link.pre_ln, "bias", HalvedIn(link.pre_ln.bias.detach())),
        "pre_ln.bias is a HalvedIn",
    ),
    "forward hook": (lambda link: link.proj1.register_forward_hook(lambda m, a, out: 2 * out), "proj1 has hooks"),
    "pre-hook": (lambda link: link.proj2.register_forward_pre_hook(lambda m, a: (2 * a[0],)), "proj2 has hooks"),
    "hook with kwargs": (
        lambda link: link.pre_ln.register_forward_hook(lambda m, a, k, out: 2 * out, with_kwargs=True),
        "pre_ln has hooks",
    ),
    "backward hook": (
        lambda link: link.proj1.register_full_backward_hook(lambda m, given, grad: (2 * given[0],)),
        "proj1 has hooks",
    ),
}


def results(link: RecursiveLink) -> list[Tensor]:
    x = make_rows(5, 40).requires_grad_()
    y = link(x)
    y.square().sum().backward()
    grads = [parameter.grad for parameter in link.parameters() if parameter.grad is not None]
    for parameter in link.parameters():
        parameter.grad = None
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_changed_layers_are_called(name: str, called: bool) -> None:
    """Before the first call, or between two: the same bits as the eager module."""
    change, reason = CHANGES[name]
    link = make_link(CONFIG)
    eager = RecursiveLink(CONFIG)
    eager.load_state_dict(link.state_dict())
    if called:
        results(link)
    torch.manual_seed(0)
    change(link)
    torch.manual_seed(0)
    change(eager)
    found, expected = results(link), results(eager)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(AssertionError, match=f"plain torch, through its layers: {reason}"):
        raise AssertionError(explain(link, make_rows(5, 40)))


def test_a_link_becomes_plain_again() -> None:
    link = make_link(CONFIG)
    expected = link(make_rows(3, 40))
    hook = link.proj1.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(link(make_rows(3, 40)), expected)
    hook.remove()
    assert torch.equal(link(make_rows(3, 40)), expected)
    assert "through its layers" not in explain(link, make_rows(3, 40))


def test_global_hooks() -> None:
    link, seen = make_link(CONFIG), []
    link(make_rows(3, 40))
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        link(make_rows(3, 40))
        assert "hooks for all modules" in explain(link, make_rows(3, 40))
    finally:
        hook.remove()
    assert seen.count(nn.Linear) == 2


class OtherGelu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return F.relu(*args) if func is F.gelu else func(*args, **(kwargs or {}))


class Logged(Tensor):
    """Rows whose class has a GELU of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(
            F.relu if func is F.gelu else func, types, args, {} if func is F.gelu else kwargs
        )


def test_functions_that_a_mode_or_the_class_of_the_rows_replaces() -> None:
    link, x = make_link(CONFIG), make_rows(3, 40)
    eager = RecursiveLink(CONFIG)
    eager.load_state_dict(link.state_dict())
    plain = link(x)
    with OtherGelu(), torch.device("cpu"):
        expected = eager(x)
        assert torch.equal(link(x), expected)
        assert "torch's functions are replaced, or a function mode may" in explain(link, x)
    assert not torch.allclose(expected, plain)
    found = link(x.as_subclass(Logged))
    assert type(found) is Logged
    assert torch.equal(found.as_subclass(Tensor), expected)
    with mock.patch.object(F, "gelu", lambda rows, approximate: F.relu(rows)):
        assert torch.equal(link(x), expected)
    for owner, name in ((F, "linear"), (F, "layer_norm"), (nn.Linear, "forward"), (nn.LayerNorm, "forward")):
        own = getattr(owner, name)
        with mock.patch.object(owner, name, lambda *args, own=own, **kwargs: own(*args, **kwargs) / 2):
            assert torch.equal(link(x), eager(x))
            assert not torch.allclose(link(x), plain)
    with torch.device("cpu"):
        assert torch.equal(link(x), plain)
        assert "through its layers" not in explain(link, x)


def test_the_eps_of_both_norms_counts() -> None:
    link = make_link(CONFIG)
    x = 0.1 * make_rows(3, 40)
    link(x)
    link.pre_ln.eps = link.post_ln.eps = 0.3
    eager = RecursiveLink(CONFIG)
    eager.load_state_dict(link.state_dict())
    eager.pre_ln.eps = eager.post_ln.eps = 0.3
    torch.testing.assert_close(link(x), eager(x))
    assert "through its layers" not in explain(link, x)


def test_copies_look_for_themselves() -> None:
    link, x = make_link(CONFIG), make_rows(3, 40)
    link(x)
    twin = copy.deepcopy(link)
    twin.proj1.register_forward_hook(lambda module, args, out: 0 * out)
    assert not torch.allclose(twin(x), link(x))
    shallow = copy.copy(link)
    assert torch.equal(shallow(x), link(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_links_call_changed_layers() -> None:
    link, x = make_link(CONFIG), make_rows(3, 40)
    link.proj1 = LoRA(link.proj1)
    compiled = torch.compile(link, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), link(x))


def test_quantised_links() -> None:
    link = make_link(CONFIG).eval()
    eager = RecursiveLink(CONFIG).eval()
    eager.load_state_dict(link.state_dict())
    for module in (link, eager):
        torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)
    with torch.no_grad():
        assert torch.equal(link(make_rows(3, 40)), eager(make_rows(3, 40)))


def test_offloaded_links() -> None:
    accelerate = pytest.importorskip("accelerate")
    link = make_link(CONFIG).requires_grad_(False)
    expected = link(make_rows(3, 40))
    accelerate.cpu_offload(link, execution_device="cpu")
    torch.testing.assert_close(link(make_rows(3, 40)), expected)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    link, parts = make_link(CONFIG), [make_rows(2, 40), make_rows(3, 40, seed=2)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    for found, part in zip(link(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(found, link(part))
    with pytest.raises(TypeError, match="x is a nested tensor, expected a tensor"):
        recursive_link(nested, link.proj1.weight, link.proj2.weight)


def test_sparse_rows() -> None:
    link, x = make_link(configs()["outer-equation-4"]), F.dropout(make_rows(5, 23), 0.5)
    torch.testing.assert_close(link(x.to_sparse_csr()), link(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_more_precision_than_the_rest(dtype: torch.dtype) -> None:
    link = make_link(CONFIG, dtype)
    link.pre_ln.float(), link.post_ln.float()
    eager = copy.deepcopy(link)
    eager.__class__ = RecursiveLink
    x = make_rows(5, 40, dtype=dtype)
    found, expected = link(x), eager(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    found.float().square().sum().backward()
    assert link.pre_ln.weight.grad.dtype == torch.float32
    assert link.proj1.weight.grad.dtype == dtype


def test_symbolic_traces_are_of_plain_torch() -> None:
    link = make_link(CONFIG)
    graph = torch.fx.symbolic_trace(nn.Sequential(link, nn.Linear(40, 2)))
    assert any(node.target == "0.proj1" for node in graph.graph.nodes)
    assert graph(make_rows(3, 40)).shape == (3, 2)


def test_functionalisation() -> None:
    link = make_link(CONFIG)
    assert torch.equal(torch.func.functionalize(link)(make_rows(3, 40)), link(make_rows(3, 40)))


def test_onnx_exports_see_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    link = make_link(CONFIG).requires_grad_(False)
    expected = link(make_rows(3, 40))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(link, (make_rows(3, 40),), strict=False)
    assert not any("recmas" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(make_rows(3, 40)), expected)


@pytest.fixture
def meta_default() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("meta_default")
def test_another_default_device() -> None:
    with torch.device("cpu"):
        link = make_link(CONFIG)
        x = torch.ones(3, 40, device="cpu")
        eager = RecursiveLink(CONFIG)
        eager.load_state_dict(link.state_dict())
        expected = eager(x)
    found = link(x)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert link.proj1.weight.grad.device.type == "cpu"
    assert isinstance(fuse(eager), FusedRecursiveLink)


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["inner", "outer", "no-residual"])
@pytest.mark.parametrize("learns", [(True, True), (False, True), (True, False)])
def test_floating_point_operations(kind: str, learns: tuple[bool, bool]) -> None:
    """Of the function, whose op has a formula; a module calls its layers under a counter, whose hooks are global."""
    link = make_link(configs()[kind])
    config = link.config
    link.requires_grad_(learns[1])
    x = make_rows(5, config.in_features).requires_grad_(learns[0])
    residual = getattr(link, "residual_proj", None)

    def eager() -> Tensor:
        y = F.linear(F.gelu(F.linear(x, link.proj1.weight)), link.proj2.weight)
        return y if residual is None else y + F.linear(x, residual.weight)

    def fused(recompute: bool = False) -> Tensor:
        w3 = None if residual is None else residual.weight
        name = "none" if config.residual == "identity" else config.residual
        return recursive_link(x, link.proj1.weight, link.proj2.weight, w3=w3, residual=name, recompute=recompute)

    assert flops(fused) == flops(eager) > 0
    assert flops(lambda: fused().sum().backward()) == flops(lambda: eager().sum().backward())
    forward = flops(eager)
    assert flops(lambda: fused(recompute=True).sum().backward()) == flops(lambda: eager().sum().backward()) + forward


RELOAD = """
import importlib, sys, torch
from recmas_kernels import FusedRecursiveLink, ops
link, x = FusedRecursiveLink.inner(40), torch.randn(3, 40, requires_grad=True)
expected = torch.autograd.grad(link(x).sum(), x)[0]
importlib.reload(sys.modules["recmas_kernels.ops"])
assert torch.equal(torch.autograd.grad(link(x).sum(), x)[0], expected)
with torch.profiler.profile():
    assert torch.equal(torch.autograd.grad(link(x).sum(), x)[0], expected)
"""


def test_the_ops_can_be_reloaded() -> None:
    """In a process of its own: what other tests hold of the ops is dropped with them."""
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
