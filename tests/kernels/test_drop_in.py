"""Random calls against the eager module in float64: whatever is given and asked for, no difference beyond rounding.

500 calls by default; ``RECMAS_FUZZ=10000`` makes it as many. A failure names the call's number, which is its seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import FusedRecursiveLink, LinkConfig, alignment_loss, latent_handoff, packed
from recmas_kernels.testing import eager_twin, make_link, make_rows

CALLS, PART = int(os.environ.get("RECMAS_FUZZ", "500")), 50
SIZES = (1, 2, 3, 8, 15, 16, 17, 31, 33, 40, 64, 65, 96, 130)
TOKENS = (0, 1, 2, 3, 7, 8, 16, 17, 33, 65)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "columns", "every other row", "every other column", "transposed", "expanded", "negated")
MODES = (
    *("grad", "grad", "no_grad", "inference", "autocast", "autocast training", "recompute", "packed", "observed"),
    *(
        "create_graph",
        "vmap",
        "jvp",
        "func_grad",
        "functionalize",
        "batched grads",
        "frozen",
        "x alone",
        "meta default",
    ),
)


@dataclass
class Call:
    """What one random call is made of."""

    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.mode, self.dtype = self.random.choice(MODES), self.random.choice(DTYPES)
        tokens = self.random.choice(TOKENS)
        self.leading = self.random.choice(((tokens,), (tokens,), (2, tokens), (1, 2, tokens), ()))

    def rows(self, *shape: int) -> Tensor:
        """Random numbers of this shape in the call's dtype, in a random layout."""
        layout = self.random.choice(LAYOUTS)
        rows = torch.randn(*shape, generator=self.generator).to(self.dtype)
        if layout == "columns":
            return torch.cat([rows, rows.new_full(rows.shape, torch.nan)], -1)[..., : shape[-1]]
        if layout == "every other row" and len(shape) > 1:
            return torch.stack([rows, torch.full_like(rows, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]
        if layout == "every other column":
            return torch.stack([rows, torch.full_like(rows, torch.nan)], -1)[..., 0]
        if layout == "transposed" and len(shape) > 1:
            return rows.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "expanded" and len(shape) > 1:
            return rows[..., :1, :].expand(shape)
        return torch._neg_view(rows) if layout == "negated" else rows

    def config(self) -> LinkConfig:
        pick = self.random.choice
        residual, wide = pick(("identity", "linear", "none")), pick(SIZES)
        out_features = wide if residual == "identity" else pick(SIZES)
        kind, norm, bias = pick(("inner", "outer")), pick((True, False)), pick((True, False))
        eps = pick((1e-5, 1e-6, 1e-3))
        return LinkConfig(
            kind, wide, pick(SIZES), out_features, residual, norm, bias, activation=pick(("gelu", "gelu_tanh")), eps=eps
        )


Results = dict[str, Tensor]
Run = Callable[[nn.Module, Tensor, Tensor], Results]


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trained(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    x = x.detach().requires_grad_()
    y, inputs = module(x), {"x": x, **named(module)}
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def inferred(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    return {"y": module(x)}


def second_order(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
    inputs = {"x": x, **named(module)}
    grads = torch.autograd.grad(dx.sin().sum(), list(inputs.values()), allow_unused=True)
    return {"dx": dx.detach()} | {k: g for k, g in zip(inputs, grads, strict=True) if g is not None}


def batched(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    x = x.detach().requires_grad_()
    inputs = {"x": x, **named(module)}
    dys = torch.stack([dy, -2 * dy])
    grads = torch.autograd.grad(module(x), list(inputs.values()), dys, is_grads_batched=True)
    return dict(zip(inputs, grads, strict=True))


def func_grad(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    def value(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (rows,)) * dy).sum()

    grads, dx = torch.func.grad(value, argnums=(0, 1))(dict(module.named_parameters()), x)
    return {"x": dx, **grads}


def jvp(module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    y, tangent = torch.func.jvp(module, (x,), (x.flip(-1).contiguous(),))
    return {"y": y, "tangent": tangent}


RUNS: dict[str, Run] = {
    "no_grad": torch.no_grad()(inferred),
    "inference": torch.inference_mode()(inferred),
    "autocast": torch.no_grad()(inferred),
    "packed": torch.no_grad()(inferred),
    "create_graph": second_order,
    "vmap": lambda module, x, dy: {"y": torch.func.vmap(module)(torch.stack([x, 2 * x]))},
    "jvp": jvp,
    "func_grad": func_grad,
    "functionalize": lambda module, x, dy: {"y": torch.func.functionalize(module)(x).detach()},
    "batched grads": batched,
}


def scope(call: Call, link: FusedRecursiveLink) -> AbstractContextManager[object]:
    """What surrounds the call of the fused link."""
    if call.mode.startswith("autocast"):
        return torch.autocast("cpu", torch.bfloat16)
    if call.mode == "packed":
        return packed(link)
    if call.mode == "observed":
        return torch.profiler.profile()
    return torch.device("meta") if call.mode == "meta default" else nullcontext()


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def compare(
    call: Call, found: Results, eager: Results, truth: Results, compute: torch.dtype, moved: Callable[[int], Results]
) -> None:
    """In the Euclidean norm, where no single element decides: within 4 times eager torch's error, and 64 eps.

    Where sums cancel, both errors are luck. There the bound is what rounding every input and parameter would do:
    ``moved(seed)`` is the truth of such inputs.
    """
    assert found.keys() == truth.keys(), call
    eps = torch.finfo(compute).eps
    for name, expected in truth.items():
        value = found[name]
        assert value.shape == expected.shape, (call, name)
        assert torch.isfinite(value).all() or not torch.isfinite(eager[name]).all(), (call, name)
        if torch.isfinite(eager[name]).all() and expected.numel() and expected.norm() > 1e-6:
            plain = error(eager[name], expected)
            bound = (4 if plain < 0.25 else 32) * plain + 64 * eps  # beyond, no digit of either is right
            if error(value, expected) > bound:
                bound += 64 * max(error(moved(seed)[name], expected) for seed in range(8))
            assert error(value, expected) <= bound, (call, call.mode, call.dtype, name, error(value, expected), bound)


def nearby(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """``tensor`` in float64, each element off by a rounding of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor.double() * (1 + torch.finfo(dtype).eps * noise)


def of_eager(run: Run, module: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """What eager torch gives; skips the call where it raises, since nothing is promised there."""
    try:
        return run(module, x, dy)
    except RuntimeError as refusal:
        raise NotPromisedError from refusal


class NotPromisedError(Exception):
    """Eager torch refuses the call."""


def check_link(call: Call) -> None:
    config = call.config()
    link = make_link(config, call.dtype, seed=call.seed)
    if call.mode in ("frozen", "no_grad"):
        link.requires_grad_(False)
    link.recompute = call.mode == "recompute"
    x, dy = call.rows(*call.leading, config.in_features), call.rows(*call.leading, config.out_features)
    before = x.clone()
    run = RUNS.get(call.mode, trained)
    eager, truth = (eager_twin(link, dtype) for dtype in (call.dtype, torch.float64))
    for twin in (eager, truth):
        for parameter, other in zip(twin.parameters(), link.parameters(), strict=True):
            parameter.requires_grad_(other.requires_grad)
    expected = of_eager(run, truth, x.double(), dy.double())
    with nullcontext() if call.mode == "meta default" else scope(call, link):
        plain = of_eager(run, eager, x, dy)
    with scope(call, link):
        found = run(link, x, dy)
    autocast = call.mode.startswith("autocast") and call.dtype is not torch.float64
    compute = torch.bfloat16 if autocast else call.dtype

    def moved(seed: int) -> Results:
        other = eager_twin(link, torch.float64)
        for number, (parameter, mine) in enumerate(zip(other.parameters(), link.parameters(), strict=True)):
            parameter.data = nearby(mine.detach(), compute, 10 * seed + number)
            parameter.requires_grad_(mine.requires_grad)
        return run(other, nearby(x, compute, -seed - 1), nearby(dy, compute, -seed - 100))

    if config.hidden_features < 3 or (config.norm and min(config.in_features, config.out_features) < 3):
        # A norm of two features, or of one number's multiples, has a constant result but for its eps, and one hidden
        # feature's gradient is a single sum, which may cancel: what is left of such derivatives is rounding.
        found, plain, expected = ({"y": part["y"]} if "y" in part else {} for part in (found, plain, expected))
    compare(call, found, plain, expected, compute, moved)
    assert torch.equal(x, before), f"{call}: x was written"


def eager_loss(pred: Tensor, target: Tensor, mask: Tensor | None, weights: tuple[float, float]) -> Tensor:
    rows = weights[0] * (1 - F.cosine_similarity(pred, target, dim=-1)) + weights[1] * (pred - target).square().mean(-1)
    mask = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    return (rows * mask).sum() / mask.sum().clamp_min(1e-9)


class Loss(nn.Module):
    def __init__(self, function: Callable[..., Tensor], arguments: Sequence[object]) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, pred: Tensor) -> Tensor:
        return self.function(pred, *self.arguments)


def check_loss(call: Call) -> None:
    width = call.random.choice(SIZES[1:])
    pred, target = call.rows(*call.leading, width), call.rows(*call.leading, width)
    mask = (torch.rand(call.leading, generator=call.generator) > 0.3) if call.random.random() < 0.5 else None
    weights = call.random.choice(((1.0, 0.0), (0.5, 2.0), (0.0, 1.0)))

    def ours(rows: Tensor, goal: Tensor, chosen: Tensor | None, factors: tuple[float, float]) -> Tensor:
        return alignment_loss(rows, goal, mask=chosen, cosine_weight=factors[0], mse_weight=factors[1])

    run = RUNS.get(call.mode, trained)
    if call.mode == "vmap":
        run = trained
    scale = torch.tensor(call.random.choice((1.0, 0.25)))

    def exact(rows: Tensor, goal: Tensor) -> Results:
        return run(Loss(eager_loss, (goal, mask, weights)), rows, scale.double())

    expected = of_eager(run, Loss(eager_loss, (target.double(), mask, weights)), pred.double(), scale.double())
    plain = of_eager(run, Loss(eager_loss, (target, mask, weights)), pred, scale.to(call.dtype))
    with scope(call, make_link(LinkConfig("inner", 2, 2, 2, "identity"))) if call.mode == "observed" else nullcontext():
        found = run(Loss(ours, (target, mask, weights)), pred, scale.to(torch.promote_types(call.dtype, torch.float32)))

    def moved(seed: int) -> Results:
        return exact(nearby(pred, call.dtype, seed), nearby(target, call.dtype, seed + 100))

    compare(call, found, plain, expected, call.dtype, moved)


def check_handoff(call: Call) -> None:
    width, table = call.random.choice(SIZES), call.random.choice((5, 20))
    count = call.random.randint(0, table)
    slots = torch.randperm(table, generator=call.generator)[:count]
    rows, embeds = call.rows(count, width), call.rows(table, width)
    expected = embeds.clone().index_copy(0, slots, rows.clone())
    with torch.no_grad():
        target = embeds.clone().contiguous()
        version = target._version
        latent_handoff(rows, nn.Identity(), target, slot_rows=slots, inplace=True)
        assert torch.equal(target, expected), call
        assert target._version > version, call
    rows, embeds = rows.detach().requires_grad_(), embeds.detach().requires_grad_()
    sent = latent_handoff(rows, nn.Identity(), embeds, slot_rows=slots)
    assert torch.equal(sent, expected), call
    dy = call.rows(table, width)
    found = torch.autograd.grad(sent, (rows, embeds), dy)
    assert torch.equal(found[0], dy[slots]), call
    assert torch.equal(found[1], dy.clone().index_fill(0, slots, 0)), call


@pytest.mark.parametrize("first", range(0, CALLS, PART))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_random_calls(first: int) -> None:
    refused = 0
    for seed in range(first, min(CALLS, first + PART)):
        call = Call(seed)
        subject = call.random.choices((check_link, check_loss, check_handoff), (8, 2, 1))[0]
        try:
            subject(call)
        except NotPromisedError:
            refused += 1
    assert refused <= PART // 5


def test_the_comparison_finds_a_weight_off_by_a_hundredth() -> None:
    caught = 0
    for seed in range(40):
        call = Call(seed)
        call.dtype = torch.float32
        config = call.config()
        link, x = make_link(config, seed=seed), torch.randn(5, config.in_features, generator=call.generator)
        truth, eager = eager_twin(link, torch.float64), eager_twin(link, torch.float32)
        with torch.no_grad():
            link.proj2.weight.mul_(1.01)
        found, plain = (trained(module, x, make_rows(5, config.out_features)) for module in (link, eager))
        expected = trained(truth, x.double(), make_rows(5, config.out_features).double())
        try:
            compare(call, found, plain, expected, torch.float32, lambda seed, same=expected: same)
        except AssertionError:
            caught += 1
    assert caught >= 36  # a norm of one or two features gives the same rows for any weight
