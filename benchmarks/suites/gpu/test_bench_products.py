"""Each candidate product of a link alone (`benchmarks.gpu.candidates`), against the library's of the same shape.

Bias, GELU, residual and column sums are part of ours and not of the library's, so 95 % of its rate is a demand on the
product and its epilogue together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.floors import Work, product
from benchmarks.harness.gpu.bench import PRODUCTS_LT, GpuBench, under_lt
from benchmarks.harness.names import FUSED, PRODUCTS
from benchmarks.harness.record import Labels
from benchmarks.harness.timing import Call
from recmas_kernels.testing import check_budget, relative_error

IN, HIDDEN, OUT = 2048, 1536, 1536
DTYPE = torch.bfloat16
Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One product of the outer link IN -> HIDDEN -> OUT over ``tokens`` rows."""

    kind: str
    tokens: int
    rank: int
    seconds: float = 6

    @property
    def id(self) -> str:
        return f"gpu-product-{self.kind.replace(' ', '-')}-T{self.tokens}"


def draw(tokens: int, device: torch.device, seed: int) -> Operands:
    """Random operands of every product; weights scaled by one over the root of the depth."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(DTYPE)

    return {
        "x": normal(tokens, IN),
        "act": normal(tokens, HIDDEN),
        "pre": normal(tokens, HIDDEN),
        "dz": normal(tokens, OUT),
        "dpre": normal(tokens, HIDDEN),
        "w1": normal(HIDDEN, IN, scale=IN**-0.5),
        "w2": normal(OUT, HIDDEN, scale=HIDDEN**-0.5),
        "w3": normal(OUT, IN, scale=IN**-0.5),
        "b1": normal(HIDDEN),
    }


def _products() -> Any:
    from benchmarks.gpu.candidates import products

    return products


def _gradients() -> Any:
    from benchmarks.gpu.candidates import gradients

    return gradients


def _gelu_slope(pre: Tensor) -> Tensor:
    learning = pre.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.gelu(learning).sum(), learning)[0]


def _flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


# By kind: our call, the same in plain torch, and the operands of the library's products (left, right).
OURS: dict[str, Callable[[Operands], Any]] = {
    "up": lambda o: _products().up(o["x"], o["w1"], o["b1"], "none", keep=True),
    "down": lambda o: _products().down(o["act"], o["x"], o["w2"], None, o["w3"], None, "linear"),
    "hidden gradient": lambda o: _products().hidden_gradient(
        o["dz"], o["w2"], o["pre"], torch.empty_like(o["pre"]), "none", sums=True
    ),
    "input gradient": lambda o: _products().input_gradient(o["dpre"], o["w1"], more=(o["dz"], o["w3"])),
    "weight gradients": lambda o: _gradients().weight_gradients(
        [(o["dpre"], o["x"], DTYPE), (o["dz"], o["act"], DTYPE), (o["dz"], o["x"], DTYPE)]
    ),
}
MAIN_RESULT: dict[str, Callable[[Any], Tensor]] = {
    "up": lambda results: results[0],
    "down": lambda results: results,
    "hidden gradient": lambda results: results[0],
    "input gradient": lambda results: results,
    "weight gradients": _flat,
}
PLAIN: dict[str, Callable[[Operands], Tensor]] = {
    "up": lambda o: F.gelu(F.linear(o["x"], o["w1"], o["b1"])),
    "down": lambda o: F.linear(o["act"], o["w2"]) + F.linear(o["x"], o["w3"]),
    "hidden gradient": lambda o: (o["dz"] @ o["w2"]) * _gelu_slope(o["pre"]),
    "input gradient": lambda o: o["dpre"] @ o["w1"] + o["dz"] @ o["w3"],
    "weight gradients": lambda o: _flat([o["dpre"].t() @ o["x"], o["dz"].t() @ o["act"], o["dz"].t() @ o["x"]]),
}
PAIRS: dict[str, Callable[[Operands], list[tuple[Tensor, Tensor]]]] = {
    "up": lambda o: [(o["x"], o["w1"].t())],
    "down": lambda o: [(torch.cat([o["act"], o["x"]], 1), torch.cat([o["w2"], o["w3"]], 1).t())],
    "hidden gradient": lambda o: [(o["dz"], o["w2"])],
    "input gradient": lambda o: [(torch.cat([o["dpre"], o["dz"]], 1), torch.cat([o["w1"], o["w3"]]))],
    "weight gradients": lambda o: [(o["dpre"].t(), o["x"]), (o["dz"].t(), o["act"]), (o["dz"].t(), o["x"])],
}


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(kind, 8, 6) for kind in OURS]
    return [Case(kind, tokens, rank) for tokens, rank in ((4096, 70), (16384, 71), (1536, 72)) for kind in OURS]


def library(pairs: list[tuple[Tensor, Tensor]]) -> Call:
    """The products into buffers that exist already."""
    outs = [torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=a.dtype) for a, b in pairs]

    def run() -> None:
        for (left, right), out in zip(pairs, outs, strict=True):
            torch.mm(left, right, out=out)

    return run


@torch.no_grad()
def test_product(case: Case, gpu_bench: GpuBench) -> None:
    device, kind = gpu_bench.device, case.kind
    first = draw(case.tokens, device, seed=0)
    truth = PLAIN[kind]({name: tensor.double() for name, tensor in first.items()})
    plain = PLAIN[kind](first)
    pairs = PAIRS[kind](first)
    work = sum((product(*left.shape, right.shape[1], DTYPE.itemsize) for left, right in pairs), Work(0, 0))
    errors = {"eager": relative_error(plain, truth)}
    if gpu_bench.facts is None:
        library(pairs)()
        pytest.skip("the Triton products need a CUDA device; their plain counterparts ran")
    actual = MAIN_RESULT[kind](OURS[kind](first))
    check_budget(kind, actual, plain, truth, DTYPE)
    errors[FUSED] = relative_error(actual, truth)

    sets = [draw(case.tokens, device, seed) for seed in range(gpu_bench.sets(work.bytes_min, cold=True))]
    builders: dict[str, Callable[[], Sequence[Call]]] = {
        FUSED: lambda: [partial(OURS[kind], o) for o in sets],
        "eager": lambda: [partial(PLAIN[kind], o) for o in sets],
        PRODUCTS: lambda: [library(PAIRS[kind](o)) for o in sets],
        PRODUCTS_LT: lambda: [partial(under_lt, library(PAIRS[kind](o))) for o in sets],
    }
    labels = Labels("products", kind, f"{IN}x{HIDDEN}x{OUT}", DTYPE, "product", case.tokens, cold=True, graph=True)
    gpu_bench.measure(labels, builders, work, errors)
