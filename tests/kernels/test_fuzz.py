"""Random calls of the public functions and of the ops, valid and not, in poisoned and guarded memory.

A valid call agrees with float64; an invalid one raises ValueError or TypeError and changes nothing. Inputs and outputs
lie between guard bands, and what no call has written is NaN. ``RECMAS_FUZZ_CALLS`` sets the number of calls, 2000 by
default; a run with another number makes other calls.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recmas_kernels import (
    FusedRecursiveLink,
    LinkConfig,
    RecursiveLink,
    alignment_loss,
    explain,
    fuse,
    latent_handoff,
    recursive_link,
    reference,
    use_backend,
)
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu.module import kernels
from tests.kernels.cpu_settings import GUARD, LAYOUTS, guarded_allocations, laid_out

CALLS = int(os.environ.get("RECMAS_FUZZ_CALLS", "2000"))
FUZZ = settings(
    max_examples=CALLS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
NOT_TENSORS = (None, 3, 0.5, "x", [1, 2], (), {}, object())
NOT_EPS = (float("nan"), -1, -1e-30, float("inf"), "a", None, [1e-5], True)
NOT_NAMES = ([1], 1, None, b"identity", "gated", "", ("linear",))


@dataclass
class Random:
    """Draws sizes, tensors between guard bands and choices; remembers what must not have changed."""

    chance: random.Random
    bands: list[tuple[Tensor, int, int]] = field(default_factory=list)
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def size(self, least: int = 0) -> int:
        return self.chance.choice((least, 1, 2, 7, 16, 17, 33, 64, 70))

    def flag(self) -> bool:
        return self.chance.random() < 0.5

    def numbers(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.chance.getrandbits(32))
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def guarded(self, values: Tensor) -> Tensor:
        """A contiguous copy of ``values`` between guard bands."""
        size = values.numel() * values.element_size()
        band = torch.full((size + 2 * GUARD + 64,), 0xAA, dtype=torch.uint8)
        start = GUARD + -(band.data_ptr() + GUARD) % 64
        self.bands.append((band, start, start + size))
        copy = band[start : start + size].view(values.dtype).view(values.shape)
        copy.copy_(values)
        return copy

    def given(self, values: Tensor) -> Tensor:
        """``values`` as an input of some layout, of which a copy is kept."""
        rows = values.dim() == 2 and values.shape[0] > 0 and values.shape[1] > 0 and values.is_floating_point()
        if rows and self.chance.random() < 0.3:
            tensor = laid_out(values, self.chance.choice(LAYOUTS))
        else:
            tensor = self.guarded(values)
        self.inputs.append((tensor, tensor.clone()))
        return tensor

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return self.given(self.numbers(rows, columns, dtype=dtype, scale=scale))

    def vector(self, length: int, dtype: torch.dtype, around: float = 0.0) -> Tensor:
        return self.given(self.numbers(length, dtype=dtype, scale=0.3) + around)

    def check_unchanged(self) -> None:
        for band, start, end in self.bands:
            assert (band[:start] == 0xAA).all(), "written before a buffer"
            assert (band[end:] == 0xAA).all(), "written past a buffer"
        for tensor, before in self.inputs:
            assert torch.equal(bits(tensor), bits(before)), "an input was changed"


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, which compare equal where NaN does not."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


@dataclass
class Case:
    """A call by name and its exact result in float64: values, each with the error that rounding may cause."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    exact: Callable[..., list[Tensor]]  # from the same arguments in float64
    found: Callable[[Any], list[Tensor]]
    bound: float  # of the largest error in eps of the result's dtype, relative to the largest value or 1
    is_op: bool = False  # torch itself refuses, with a RuntimeError, what the op's schema does not allow


def doubled(value: Any) -> Any:
    if learns(value):
        return value.detach().double()
    return tuple(doubled(part) for part in value) if isinstance(value, tuple) else value


def learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    flat = [part for value in arguments.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in flat if learns(part)]


# A result is a few sums of up to 70 products between two norms. Rounding an input or a sum once moves what follows by
# eps of its size; a norm divides by the spread of its row, which for random rows of 7 or more is above a third of the
# largest value; GELU's slope is at most 1.13. With the random signs of rounding, sqrt(70) of them come together.
STEPS = 8 * 70**0.5


def link_case(random: Random) -> Case:
    dtype, residual = random.chance.choice(DTYPES), random.chance.choice(("identity", "linear", "none"))
    norm, tokens = random.flag(), random.size()
    least = 7 if norm else 1  # a norm of one or two features is nothing but rounding, and so is that of their products
    hidden = max(least if residual == "none" else 1, random.size(1))
    inner = max(least, random.size(1))
    outer = inner if residual == "identity" else max(least, random.size(1))
    arguments: dict[str, Any] = {
        "x": random.matrix(tokens, inner, dtype),
        "w1": random.matrix(hidden, inner, dtype, inner**-0.5),
        "w2": random.matrix(outer, hidden, dtype, hidden**-0.5),
        "b1": random.vector(hidden, dtype) if random.flag() else None,
        "b2": random.vector(outer, dtype) if random.flag() else None,
        "residual": residual,
        "eps": random.chance.choice((1e-5, 1e-2, 1)),
        "activation": random.chance.choice(("gelu", "gelu_tanh")),
        "recompute": random.flag(),
    }
    if residual == "linear":
        arguments["w3"] = random.matrix(outer, inner, dtype, inner**-0.5)
        arguments["b3"] = random.vector(outer, dtype) if random.flag() else None
    for name, width in (("norm_in", inner), ("norm_out", outer)):
        if norm and random.flag():
            bias = random.vector(width, dtype) if random.flag() else None
            arguments[name] = (random.vector(width, dtype, 1.0), bias)
    if tokens and random.chance.random() < 0.2:
        arguments["x"] = arguments["x"].unflatten(0, (tokens, 1))
    training = random.flag()
    dy = random.numbers(*arguments["x"].shape[:-1], outer, dtype=dtype)

    def results(call: dict[str, Any], dy: Tensor) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [recursive_link(**call)]
        learning: dict[str, Any] = {}
        for name, value in call.items():
            parts = value if isinstance(value, tuple) else (value,)
            copies = tuple(p.detach().requires_grad_() if learns(p) else p for p in parts)
            learning[name] = copies if isinstance(value, tuple) else copies[0]
        y = recursive_link(**learning)
        return [y.detach(), *torch.autograd.grad(y, tensors_of(learning), dy)]

    def exact(**call: Any) -> list[Tensor]:
        with use_backend("reference"):
            return results(call, dy.double())

    # A parameter's gradient sums over the tokens as well, and every value passes through up to four roundings.
    return Case(lambda **call: results(call, dy), arguments, exact, lambda found: found, STEPS)


def handoff_case(random: Random) -> Case:
    dtype = random.chance.choice(DTYPES)
    table, width = random.size(1), random.size(1)
    slots = torch.randperm(table, generator=torch.Generator().manual_seed(random.chance.getrandbits(16)))
    slots = slots[: random.chance.randint(0, table)]
    arguments: dict[str, Any] = {
        "hidden": random.matrix(len(slots), width, dtype),
        "link": torch.nn.Identity(),
        "embeds": random.matrix(table, width, random.chance.choice(DTYPES)),
        "slot_rows": random.given(slots),
    }
    if random.flag() and len(slots):
        arguments["hidden"] = random.matrix(9, width, dtype)
        arguments["source_rows"] = random.given(torch.randint(9, (len(slots),)))

    def exact(hidden: Tensor, embeds: Tensor, slot_rows: Tensor, source_rows: Any = None, **_: Any) -> list[Tensor]:
        rows = hidden if source_rows is None else hidden[source_rows]
        return [reference.handoff_fwd(rows.to(arguments["embeds"].dtype).double(), embeds, slot_rows)]

    return Case(latent_handoff, arguments, exact, lambda found: [found], 0.0)


def alignment_case(random: Random) -> Case:
    dtype, tokens, width = random.chance.choice(DTYPES), random.size(), random.size(1)
    gather = random.flag()
    arguments: dict[str, Any] = {
        "pred": random.matrix(tokens, width, dtype),
        "target": random.matrix(11 if gather else tokens, width, dtype),
        "cosine_weight": random.chance.choice((0.0, 1.0, 0.5)),
        "mse_weight": random.chance.choice((0.0, 1, 0.25)),
        "embed_scale": random.chance.choice((1.0, 2.0)),
    }
    if gather:
        arguments["token_ids"] = random.given(torch.randint(11, (tokens,)))
    if random.flag():
        arguments["mask"] = random.given(torch.rand(tokens) > 0.3)

    def exact(pred: Tensor, target: Tensor, token_ids: Any = None, mask: Any = None, **weights: float) -> list[Tensor]:
        names = ("cosine_weight", "mse_weight", "embed_scale")
        return [reference.alignment_fwd(pred, target, token_ids, mask, *(weights[name] for name in names))[0]]

    return Case(alignment_loss, arguments, exact, lambda found: [found.detach()], STEPS)


def op_case(random: Random) -> Case:
    """An op itself, by position; its arguments' names are those of its schema."""
    case = random.chance.choice((handoff_case, alignment_case))(random)
    arguments = case.arguments
    if "pred" in arguments:
        order = ("pred", "target", "token_ids", "mask", "cosine_weight", "mse_weight", "embed_scale")
        values = {name: arguments.get(name) for name in order}
        return Case(
            lambda **call: torch.ops.recmas.alignment_fwd(*call.values()), values, case.exact, first, STEPS, True
        )
    rows = arguments["hidden"]
    if "source_rows" in arguments:
        rows = rows[arguments["source_rows"]]
    values = {"rows": rows, "embeds": arguments["embeds"], "slot_rows": arguments["slot_rows"]}
    if values["embeds"].stride(1) != 1:
        values["embeds"] = values["embeds"].contiguous()

    def exact(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> list[Tensor]:
        return [reference.handoff_fwd(rows.to(values["embeds"].dtype).double(), embeds, slot_rows)]

    return Case(calling(torch.ops.recmas.handoff_fwd), values, exact, lambda y: [y], 0.0, True)


def calling(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **call: op(*call.values())


def first(found: tuple[Tensor, ...]) -> list[Tensor]:
    return [found[0]]


KINDS = (link_case, handoff_case, alignment_case, op_case)


def spoiled(random: Random, case: Case) -> dict[str, Any]:
    """The case's arguments with one that cannot be right."""
    arguments = dict(case.arguments)
    names = [name for name in arguments if name != "recompute"]
    if case.is_op:
        names = [name for name in names if isinstance(arguments[name], Tensor)]
    name = random.chance.choice(names)
    value, chance = arguments[name], random.chance
    if isinstance(value, tuple):
        weight, bias = value
        spoil = (torch.cat([weight, weight]), weight[:, None], weight.long(), "x")
        arguments[name] = chance.choice((3, weight, (weight,), (None, bias), *((part, bias) for part in spoil)))
    elif isinstance(value, Tensor):
        counts = arguments.get("mask") if name == "token_ids" else None
        wrong = wrong_tensor(random, name, value, counts)
        while case.is_op and not isinstance(wrong, Tensor):
            wrong = wrong_tensor(random, name, value, counts)
        arguments[name] = wrong
    elif name == "eps":
        arguments[name] = chance.choice(NOT_EPS)
    elif name in ("residual", "activation"):
        arguments[name] = chance.choice(NOT_NAMES)
    elif name == "link":
        arguments[name] = chance.choice((3, None, lambda rows: None, lambda rows: rows[None].long(), too_many))
    elif name in ("cosine_weight", "mse_weight", "embed_scale"):
        arguments[name] = chance.choice((float("nan"), float("inf"), "1", None, [1.0]))
    else:  # an absent parameter
        arguments[name] = chance.choice((3, "x", torch.zeros(1, 2, 3), torch.zeros(71, dtype=torch.int64)))
    return arguments


def too_many(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows, rows.new_zeros(1, rows.shape[1])])


def wrong_tensor(random: Random, name: str, value: Tensor, counts: Tensor | None = None) -> Any:
    """In the place of `value`; rows that do not count may hold any number, so what is outside stands where one does."""
    chance = random.chance
    if not value.is_floating_point() and value.dtype is not torch.bool:  # row numbers
        choices = [value.int(), value.float(), value[:, None], torch.cat([value, value, value.new_zeros(1)])]
        read = range(len(value)) if counts is None else counts.nonzero().flatten().tolist()
        if read:
            outside = value.clone()
            outside[chance.choice(read)] = chance.choice((-1, 10**6, 2**62, -(2**62), 71))
            choices.append(outside)
        return chance.choice([*choices, 3, [0]])
    taller = value.new_zeros(value.shape[0] + 1, *value.shape[1:]) if value.dim() else value
    wider = value.new_zeros(*value.shape[:-1], value.shape[-1] + 1)
    choices = [wider, value.new_zeros(()), value.new_zeros(*value.shape, 73), value.to("meta"), "x", 3, [1.0]]
    if value.dtype is not torch.bool:
        choices += [value.to(chance.choice(OTHER_DTYPES)), value.to_sparse() if value.dim() == 2 else wider]
    if name not in ("x", "w2", "hidden", "embeds", "target"):  # these may have more rows
        choices.append(taller)
    return chance.choice(choices)


SEEN: Counter[str] = Counter()


@FUZZ
@given(seed=st.integers(0, 2**63 - 1), valid=st.booleans(), backend=st.sampled_from(("auto", "reference")))
def run_calls(seed, valid, backend):
    torch.manual_seed(seed % 2**32)
    random_values = Random(random.Random(seed))
    case = random_values.chance.choice(KINDS)(random_values)
    SEEN["valid" if valid else "invalid"] += 1
    with use_backend(backend):
        if valid:
            check_valid(case)
        else:
            arguments = spoiled(random_values, case)
            with pytest.raises((ValueError, TypeError)):
                case.function(**arguments)
    random_values.check_unchanged()


def check_valid(case: Case) -> None:
    served = any(tensor.dtype is not torch.float64 for tensor in tensors_of(case.arguments))
    if served:
        with guarded_allocations(expected=False):
            found = [value.clone() for value in case.found(case.function(**case.arguments))]
    else:
        found = case.found(case.function(**case.arguments))
    exact = case.exact(**{name: doubled(value) for name, value in case.arguments.items()})
    assert len(found) == len(exact)
    for actual, truth in zip(found, exact, strict=True):
        assert actual.shape == truth.shape
        assert torch.isfinite(actual).all()
        if truth.numel():
            scale = max(1.0, truth.abs().max().item())
            assert (actual.double() - truth).abs().max().item() <= case.bound * torch.finfo(actual.dtype).eps * scale


def test_random_calls_agree_with_float64_or_are_refused(record_property):
    SEEN.clear()
    run_calls()
    found = f"0 faults: {SEEN['valid']} agree with float64, {SEEN['invalid']} are refused"
    record_property("torture", ("random calls of the Python surface", SEEN.total(), found))
    assert SEEN["valid"] + SEEN["invalid"] >= CALLS
    assert min(SEEN["valid"], SEEN["invalid"]) >= CALLS // 4


@pytest.mark.parametrize(
    "call",
    [
        *(lambda value=value: LinkConfig("inner", 4, 4, 4, "identity", eps=value) for value in NOT_EPS),
        *(lambda value=value: LinkConfig("inner", 4, 4, 4, value) for value in NOT_NAMES),
        *(lambda value=value: LinkConfig("inner", value, 4, 4, "none") for value in (-1, "a", None, 2.0, True)),
        *(lambda value=value: LinkConfig.from_dict(value) for value in NOT_TENSORS),
        *(lambda value=value: RecursiveLink(value) for value in NOT_TENSORS),
        *(lambda value=value: FusedRecursiveLink.inner(4, dtype=value) for value in (3, "float32", torch.int64)),
        *(lambda value=value: FusedRecursiveLink.inner(4, device=value) for value in ("nowhere", [1], "cpu:x")),
        *(lambda value=value: FusedRecursiveLink.outer(4, value) for value in (-1, "a", None, [1])),
        *(lambda value=value: FusedRecursiveLink.inner(4, layers=value) for value in (0, True, 3, torch.ones(2))),
        *(lambda value=value: FusedRecursiveLink.inner(4, norm=value) for value in (1, "yes", None)),
        *(lambda value=value: FusedRecursiveLink.from_upstream(value) for value in (None, 3, [], {}, {"a": 1})),
        *(
            lambda value=value: FusedRecursiveLink.from_upstream({"proj1.weight": value, "proj2.weight": value})
            for value in (3, torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, 2))
        ),
        lambda: FusedRecursiveLink.from_upstream(
            {"proj1.weight": torch.zeros(3, 3).long(), "proj2.weight": torch.zeros(3, 3).long()}, "adapter"
        ),
        *(lambda value=value: FusedRecursiveLink.from_pretrained(value) for value in (None, 3, [])),
        *(lambda value=value: FusedRecursiveLink.inner(4).save_pretrained(value) for value in (None, 3, [])),
        *(lambda value=value: fuse(value) for value in NOT_TENSORS),
        *(lambda value=value: explain(value, torch.zeros(2, 4)) for value in NOT_TENSORS),
        *(lambda value=value: explain(RecursiveLink.inner(4), value) for value in (*NOT_TENSORS, torch.zeros(()))),
        *(lambda value=value: use_backend(value).__enter__() for value in (None, 3, [], "", "gpu")),
    ],
)
def test_what_no_call_can_mean_is_refused(call):
    with pytest.raises((ValueError, TypeError)):
        call()


FLOATS = torch.zeros(3, 4)
ROWS = torch.tensor([0, 1, 2])
WEIGHTS = (torch.zeros(6, 4), torch.zeros(6), torch.zeros(4, 6), torch.zeros(4), *([None] * 6))
SETTINGS = ("identity", "none", 1e-5, torch.float32)
NORMED = (*WEIGHTS[:8], torch.ones(4), None)


def link_bwd(dy=FLOATS, pre=(3, 6), z=None, stats=(4, 3), parameters=WEIGHTS, stats_dtype=torch.float32):
    saved = [None if shape is None else torch.zeros(shape) for shape in (pre, z)]
    kept = None if stats is None else torch.zeros(stats, dtype=stats_dtype)
    return torch.ops.recmas.link_bwd(dy, FLOATS, *saved, kept, *parameters, *SETTINGS, [True] * 11)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ops.recmas.link_fwd(torch.zeros(3, 5), *WEIGHTS, *SETTINGS, False),
        lambda: torch.ops.recmas.link_fwd(torch.zeros(4), *WEIGHTS, *SETTINGS, False),
        lambda: torch.ops.recmas.link_fwd(FLOATS.to("meta"), *WEIGHTS, *SETTINGS, False),
        lambda: torch.ops.recmas.link_fwd(FLOATS, *WEIGHTS, "identity", "sharp", 1e-5, torch.float32, False),
        lambda: torch.ops.recmas.link_fwd(FLOATS, *WEIGHTS, "gated", "none", 1e-5, torch.float32, False),
        lambda: torch.ops.recmas.link_fwd(FLOATS, *WEIGHTS, "identity", "none", -1.0, torch.float32, False),
        lambda: torch.ops.recmas.link_fwd(FLOATS, *WEIGHTS, "identity", "none", 1e-5, torch.int32, False),
        lambda: torch.ops.recmas.link_fwd_train(FLOATS, WEIGHTS[0][:, :3], *WEIGHTS[1:], *SETTINGS),
        lambda: torch.ops.recmas.link_fwd_train(FLOATS, WEIGHTS[0].long(), *WEIGHTS[1:], *SETTINGS),
        lambda: link_bwd(dy=torch.zeros(2, 4)),
        lambda: link_bwd(dy=torch.zeros(3, 5)),
        lambda: link_bwd(dy=torch.zeros(3, 4, device="meta")),
        lambda: link_bwd(pre=(2, 6)),
        lambda: link_bwd(pre=(3, 5)),
        lambda: link_bwd(stats=(4, 2)),
        lambda: link_bwd(stats=None),
        lambda: link_bwd(stats_dtype=torch.bfloat16),
        lambda: link_bwd(parameters=NORMED),
        lambda: link_bwd(parameters=NORMED, z=(0,)),
        lambda: torch.ops.recmas.handoff_(FLOATS, torch.zeros(9, 4), ROWS[:2]),
        lambda: torch.ops.recmas.handoff_(FLOATS[:2], torch.zeros(9, 4), ROWS),
        lambda: torch.ops.recmas.handoff_(FLOATS, torch.zeros(9, 5), ROWS),
        lambda: torch.ops.recmas.handoff_(FLOATS, torch.zeros(9, 4), ROWS.int()),
        lambda: torch.ops.recmas.handoff_(FLOATS, torch.zeros(9, 8)[:, ::2], ROWS),
        lambda: torch.ops.recmas.handoff_(FLOATS, torch.zeros(2, 4), ROWS),
        lambda: torch.ops.recmas.handoff_fwd(FLOATS, torch.zeros(9, 4), ROWS.to("meta")),
        lambda: torch.ops.recmas.handoff_bwd(torch.zeros(9, 4), ROWS - 1),
        lambda: torch.ops.recmas.handoff_bwd(torch.zeros(9, 4), ROWS.int()),
        lambda: torch.ops.recmas.handoff_bwd(torch.zeros(9), ROWS),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, torch.zeros(2, 4), None, None, 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, torch.zeros(9, 5), ROWS, None, 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, torch.zeros(9, 4), ROWS[:2], None, 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, torch.zeros(9, 4), ROWS.int(), None, 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, torch.zeros(2, 4), ROWS, None, 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, FLOATS, None, torch.ones(2), 1.0, 0.0, 1.0),
        lambda: torch.ops.recmas.alignment_fwd(FLOATS, FLOATS.to("meta"), None, None, 1.0, 0.0, 1.0),
    ],
)
def test_ops_refuse_what_does_not_fit(call, backend):
    with use_backend(backend), pytest.raises((ValueError, TypeError)):
        call()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize(
    "call",
    [
        lambda native: native.handoff_scatter(FLOATS, ROWS[:2], torch.zeros(9, 4)),
        lambda native: native.handoff_scatter(FLOATS, ROWS, torch.zeros(9, 5)),
        lambda native: native.handoff_scatter(FLOATS, ROWS.int(), torch.zeros(9, 4)),
        lambda native: native.handoff_scatter(FLOATS, ROWS, torch.zeros(9, 4, dtype=torch.bfloat16)),
        lambda native: native.handoff_scatter(FLOATS, torch.zeros(6).long()[::2], torch.zeros(9, 4)),
        lambda native: native.handoff_take(torch.zeros(9, 4), ROWS, torch.zeros(2, 4)),
        lambda native: native.handoff_take(torch.zeros(9, 4), ROWS, torch.zeros(3, 8)[:, :4]),
        lambda native: align(native, target=torch.zeros(2, 4)),
        lambda native: align(native, target=torch.zeros(9, 4), ids=ROWS[:2]),
        lambda native: align(native, target=torch.zeros(9, 4), ids=ROWS.int()),
        lambda native: align(native, mask=torch.ones(2)),
        lambda native: align(native, mask=torch.ones(3, dtype=torch.float64)),
        lambda native: align(native, loss=torch.zeros((), dtype=torch.bfloat16)),
        lambda native: align(native, grad=torch.zeros(3, 4, dtype=torch.bfloat16)),
        lambda native: align(native, grad=torch.zeros(2, 4)),
    ],
)
def test_bindings_pass_on_no_address_that_does_not_fit(call):
    """Behind the ops' checks: what a kernel would read or write outside of its tensors never reaches it."""
    with pytest.raises((ValueError, TypeError)):
        call(kernels())


def align(native, target=FLOATS, ids=None, mask=None, loss=None, grad=None):
    loss = torch.zeros(()) if loss is None else loss
    grad = torch.empty(3, 4) if grad is None else grad
    native.alignment(0, 1, FLOATS, target, ids, mask, 1.0, 0.0, 1.0, loss, grad)
