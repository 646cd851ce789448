"""Derivatives, however they are asked for (higher orders, traces, exports, batches, none at all): as eager ones."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from recmas_kernels import FusedRecursiveLink, alignment_loss, latent_handoff, ops, reference
from recmas_kernels.testing import configs, eager_twin, make_link, make_rows

KINDS = ("inner", "outer", "outer-equation-4", "tanh")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[FusedRecursiveLink, nn.Module]:
    link = make_link(configs()[kind], dtype)
    return link, eager_twin(link, dtype)


def eager_loss(pred: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(pred, target, dim=-1)).mean() + 0.3 * F.mse_loss(pred, target)


def loss(pred: Tensor, target: Tensor) -> Tensor:
    return alignment_loss(pred, target, mse_weight=0.3)


def all_close(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Within 256 eps of the largest element: two orders of sums of some hundred terms."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for one, other in pairs:
        bound = 256 * torch.finfo(other.dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


def penalty(link: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of every parameter and of x through a gradient penalty."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(link(x).sin().sum(), x, create_graph=True)
    inputs = (x, *link.parameters())
    found = torch.autograd.grad(dx.norm(dim=-1).square().sum(), inputs, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, found, strict=True)]


def parameter_hessian(link: nn.Module, x: Tensor) -> list[Tensor]:
    """The Hessian times a vector, over the parameters."""
    parameters = list(link.parameters())
    grads = torch.autograd.grad(link(x).square().sum(), parameters, create_graph=True)
    vectors = [make_rows(*p.shape, dtype=p.dtype, seed=index) for index, p in enumerate(parameters)]
    return list(torch.autograd.grad(grads, parameters, vectors))


def third_order(link: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    value = link(x).sin().sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        value = dx.square().sum()
    return list(torch.autograd.grad(value, x))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("asked", [penalty, parameter_hessian, third_order])
@pytest.mark.parametrize("kind", KINDS)
def test_higher_order_of_links(kind: str, asked: Callable[[nn.Module, Tensor], list[Tensor]], recompute: bool) -> None:
    link, eager = pair(kind)
    link.recompute = recompute
    x = make_rows(3, link.config.in_features, dtype=torch.float64)
    expected = asked(eager, x)
    assert max(grad.abs().max() for grad in expected) > 0
    all_close(asked(link, x), expected)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_hessians_of_links(kind: str, vectorize: bool) -> None:
    link, eager = pair(kind)
    x = make_rows(1, link.config.in_features, dtype=torch.float64)
    found, expected = (
        torch.autograd.functional.hessian(lambda rows, m=module: m(rows).sin().sum(), x, vectorize=vectorize)
        for module in (link, eager)
    )
    all_close(found, expected)


def test_one_tensor_in_several_places() -> None:
    link, eager = pair("inner")
    for module in (link, eager):
        module.proj2.weight = module.proj1.weight
    x = make_rows(3, 40, dtype=torch.float64)
    all_close(penalty(link, x), penalty(eager, x))


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessians_of_the_loss(vectorize: bool) -> None:
    pred, target = (make_rows(3, 5, dtype=torch.float64, seed=seed) for seed in (1, 2))
    hessian = torch.autograd.functional.hessian
    expected = hessian(lambda rows: eager_loss(rows, target), pred, vectorize=vectorize)
    assert expected.abs().max() > 0
    all_close(hessian(lambda rows: loss(rows, target), pred, vectorize=vectorize), expected)


def test_the_second_order_of_a_masked_loss_reads_no_masked_row() -> None:
    pred, table = (make_rows(4, 5, dtype=torch.float64, seed=seed) for seed in (1, 2))
    pred[1] = float("nan")
    mask, kept = torch.tensor([True, False, True, True]), [0, 2, 3]
    ids = torch.tensor([3, 0, 1, 1])

    def masked(rows: Tensor) -> Tensor:
        return alignment_loss(rows, table, token_ids=ids, mask=mask)

    found = torch.autograd.functional.hessian(masked, pred)
    expected = torch.autograd.functional.hessian(
        lambda rows: (1 - F.cosine_similarity(rows, table[ids[kept]], dim=-1)).mean(), pred[kept]
    )
    all_close(found[kept][:, :, kept], expected)
    assert not found[1].any()


def test_the_second_order_of_a_handoff() -> None:
    rows, embeds = (make_rows(n, 4, dtype=torch.float64).requires_grad_() for n in (2, 5))
    slots = torch.tensor([3, 0])

    def send(hidden: Tensor, table: Tensor) -> Tensor:
        return latent_handoff(hidden, nn.Identity(), table, slot_rows=slots)

    assert torch.autograd.gradgradcheck(send, (rows, embeds))
    assert torch.autograd.gradcheck(send, (rows, embeds))


def test_the_derivative_of_the_backward_op() -> None:
    link, eager = pair("outer")
    x, dy = (make_rows(3, n, dtype=torch.float64).requires_grad_() for n in (40, 23))
    modules = link._modules
    names = ("proj1", "proj2", "residual_proj", "ln_source", "ln_target")
    parameters = [p for name in names for p in (modules[name].weight, modules[name].bias)]
    settings = ("linear", "none", 1e-5, torch.float64)
    grads = ops.link_bwd(dy, x, None, None, None, *parameters, *settings, [True] * 11)
    found = torch.autograd.grad(grads[0].square().sum() + grads[1].sum(), (dy, x, link.proj1.weight))
    first = torch.autograd.grad(eager(x), (x, eager.proj1.weight), dy, create_graph=True)
    expected = torch.autograd.grad(first[0].square().sum() + first[1].sum(), (dy, x, eager.proj1.weight))
    all_close(found, expected)


def gradients(module: Callable[..., Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(module(x).sin().sum(), (x, *parameters)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_exported_modules_learn(kind: str, decomposed: bool, strict: bool) -> None:
    link, eager = pair(kind, torch.float32)
    x = make_rows(3, link.config.in_features)
    program = torch.export.export(link, (x,), strict=strict)
    assert any("recmas" in str(node.target) for node in program.graph.nodes)
    module = (program.run_decompositions() if decomposed else program).module()
    expected = gradients(eager, x, list(eager.parameters()))
    all_close(gradients(module, x, [module.get_parameter(name) for name, _ in link.named_parameters()]), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_traced_modules_learn_after_they_were_saved(grad: bool) -> None:
    link, eager = pair("outer", torch.float32)
    x, buffer = make_rows(3, link.config.in_features), io.BytesIO()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(link, (x,)), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    named = dict(loaded.named_parameters())
    found = gradients(loaded, x, [named[name] for name, _ in link.named_parameters()])
    all_close(found, gradients(eager, x, list(eager.parameters())))


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_graphs_of_make_fx_learn(tracing: str, pre_dispatch: bool) -> None:
    link, eager = pair("inner", torch.float32)
    x = make_rows(3, 40)
    graph = make_fx(link, tracing_mode=tracing, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(x)
    all_close(gradients(graph, x, []), gradients(eager, x, []))


def test_make_fx_of_a_step() -> None:
    link, eager = pair("inner", torch.float32)
    x, target = make_rows(3, 40), make_rows(3, 40, seed=2)

    def step(rows: Tensor) -> Tensor:
        rows = rows.detach().requires_grad_()
        return torch.autograd.grad(loss(link(rows), target), rows)[0]

    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    learning = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(eager_loss(eager(learning), target), learning)
    all_close(graph(x), expected)


def test_fake_tensors_through_link_handoff_and_loss() -> None:
    with FakeTensorMode():
        link = FusedRecursiveLink.inner(8)
        sent = latent_handoff(torch.randn(2, 8), link, torch.randn(5, 8), slot_rows=torch.tensor([3, 0]))
        alignment_loss(sent, torch.randn(5, 8)).backward()
        assert link.proj1.weight.grad.shape == (8, 8)


def test_batches_of_gradients_of_the_loss() -> None:
    pred, target = make_rows(4, 8).requires_grad_(), make_rows(4, 8, seed=2)
    value = loss(pred, target)
    (alone,) = torch.autograd.grad(value, pred, retain_graph=True)
    (batched,) = torch.autograd.grad(value, pred, torch.tensor([1.0, 2.0, -3.0]), is_grads_batched=True)
    all_close(batched, torch.stack([alone, 2 * alone, -3 * alone]))


class Undefined(torch.autograd.Function):
    """Passes a value on and gives no gradient back."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_undefined_gradients_stay_undefined() -> None:
    link = make_link(configs()["inner"])
    x, rows = make_rows(3, 40).requires_grad_(), make_rows(5, 40)
    for observed in (False, True):
        with torch.profiler.profile() if observed else warnings.catch_warnings():
            sent = latent_handoff(link(x), nn.Identity(), rows.clone().requires_grad_(), slot_rows=torch.arange(3))
            values = (link(x), loss(link(x), rows[:3]), sent)
        for value in values:
            Undefined.apply(value).sum().backward()
        assert x.grad is None
        assert all(parameter.grad is None for parameter in link.parameters())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gradients_are_never_lent(scale: float) -> None:
    """What a caller writes into a gradient changes no later one."""
    link = make_link(configs()["inner"])
    pred, target = make_rows(4, 40).requires_grad_(), make_rows(4, 40, seed=2)
    for value in (loss(pred, target), link(pred).sum()):
        (first,) = torch.autograd.grad(value, pred, torch.tensor(scale), retain_graph=True)
        kept = first.clone()
        first.data.mul_(0.01)
        first.mul_(0.01)
        (second,) = torch.autograd.grad(value, pred, torch.tensor(scale))
        assert torch.equal(second, kept)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_handoffs_in_place_show_in_the_version(compiled: bool) -> None:
    rows, slots = make_rows(2, 8), torch.tensor([3, 0])

    @torch.no_grad()
    def send(table: Tensor) -> None:
        latent_handoff(rows, nn.Identity(), table, slot_rows=slots, inplace=True)

    run = torch.compile(send, backend="aot_eager") if compiled else send
    table, other = make_rows(5, 8), make_rows(5, 8, seed=2).requires_grad_()
    product = (table * other).sum()
    before = table._version
    run(table)
    assert table._version > before
    assert torch.equal(table[slots], rows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_op_that_writes_has_no_derivative() -> None:
    rows, embeds = make_rows(2, 8).requires_grad_(), make_rows(5, 8)
    with pytest.raises(RuntimeError, match="recmas::handoff_ has no derivative"):
        ops.handoff_(rows, embeds, torch.tensor([3, 0]))


def test_autograd_registrations() -> None:
    link = make_link(configs()["outer-equation-4"], torch.float64)
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in (link.proj1, link.proj2, link.residual_proj))
    x = make_rows(3, 23, dtype=torch.float64).requires_grad_()
    call = (x, w1, b1, w2, b2, w3, b3, None, None, None, None, "linear", "none", 1e-5, torch.float64)
    opcheck(ops.link_fwd, (*call, False))
    opcheck(ops.link_fwd_train, call)
    rows, embeds = (make_rows(n, 8).requires_grad_() for n in (2, 5))
    opcheck(ops.handoff_fwd, (rows, embeds, torch.tensor([3, 0])))
    opcheck(ops.handoff_bwd, (embeds, torch.tensor([3, 0])))
    opcheck(ops.alignment_fwd, (embeds, make_rows(5, 8), None, None, 1.0, 0.1, 1.0))
    assert reference.alignment_loss(embeds, make_rows(5, 8), None, None, 1.0, 0.1, 1.0).requires_grad
