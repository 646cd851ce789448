"""What must be known before anything is tuned: each answer can change a decision. Nothing here is a claim.

The answers are in the run file under "answers" and, once stored, on the device's page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.gpu.bench import GpuBench, under_lt
from benchmarks.harness.gpu.forecast import COMPILE_MAX
from benchmarks.harness.names import FUSED
from benchmarks.harness.timing import Call
from benchmarks.peers.link_gpu import FORWARD, compiled, link_calls, link_peers
from benchmarks.suites.gpu.link_grid import AUTOTUNED_RANK, INNER, MORE_RANK, OUTER, SMALL_INNER, SMALL_OUTER, narrow
from recmas_kernels import LinkConfig, use_backend
from recmas_kernels.testing import make_link

DTYPE = torch.bfloat16
CHAIN = 200  # short kernels in a row, the gap between two of which is wanted
BODY_BYTES = 2**30  # what an agent's body reads between two latent steps, at least


@dataclass(frozen=True)
class Case:
    """``kind`` names the test below; the sizes mean what that test says."""

    kind: str
    tokens: int = 0
    config: LinkConfig = INNER
    rank: int = 15
    seconds: float = 4
    cold: bool = True

    @property
    def id(self) -> str:
        config = self.config
        sizes = f"{config.in_features}x{config.hidden_features}x{config.out_features}"
        return f"gpu-{self.kind.replace(' ', '-')}-{sizes}-T{self.tokens}-{'cold' if self.cold else 'warm'}-{self.rank}"


def square(features: int) -> LinkConfig:
    return LinkConfig("inner", features, features, features, "identity", norm=False)


def cases(full: bool) -> list[Case]:
    if not full:
        kinds = ("library product", "max-autotune product", "gelu", "dispatch", "joined operand", "in a body's stream")
        return [Case(kind, 5, SMALL_OUTER if kind == "joined operand" else SMALL_INNER, 10) for kind in kinds]
    found = [Case("gaps", rank=13)]
    found += [Case("dispatch", tokens) for tokens in (1, 8, 32, 128, 512)]
    found += [Case("dispatch", tokens, OUTER) for tokens in (1, 32, 1536)]
    found += [Case("variant", 16384, narrow(hidden)) for hidden in (128, 256, 512)]
    found += [Case("variant", 16384, INNER), Case("variant", 1536, OUTER), Case("variant", 16384, OUTER)]
    found += [Case("variant", tokens, narrow(hidden)) for hidden in (128, 256) for tokens in (64, 512, 2048)]
    found += [Case("library product", tokens, cold=cold, rank=16) for tokens in (1, 8, 32) for cold in (True, False)]
    found += [
        Case("library product", tokens, square(features), rank=MORE_RANK, cold=cold)
        for features in (1536, 2560, 4096)
        for tokens in (1, 8, 32)
        for cold in (True, False)
    ]
    found += [Case("gelu", tokens, rank=17) for tokens in (512, 1536, 4096, 16384)]
    found += [Case("joined operand", tokens, OUTER, rank=18) for tokens in (1536, 16384)]
    found += [Case("in a body's stream", tokens, rank=19, seconds=8) for tokens in (1, 32)]
    found += [Case("max-autotune product", tokens, rank=AUTOTUNED_RANK, seconds=30) for tokens in (1, 32)]
    return found


def test_question(case: Case, gpu_bench: GpuBench) -> None:
    with torch.no_grad():
        TESTS[case.kind](case, gpu_bench)


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Random rows, or weights scaled by one over the root of the depth."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5).to(DTYPE)


def products_of(case: Case, bench: GpuBench) -> tuple[floors.Work, list[tuple[Tensor, Tensor, Tensor]]]:
    """Operands ``(rows, weight, out)`` of ``rows weight^T`` in as many copies as a cold cell needs."""
    features, device = case.config.in_features, bench.device
    work = floors.product(case.tokens, features, features, DTYPE.itemsize)
    return work, [
        (
            normal(device, case.tokens, features, seed=seed),
            normal(device, features, features, seed=seed + 1000),
            torch.empty(case.tokens, features, device=device, dtype=DTYPE),
        )
        for seed in range(bench.sets(work.bytes_min, cold=case.cold))
    ]


def what(case: Case) -> str:
    config = case.config
    sizes = f"{config.in_features} -> {config.hidden_features} -> {config.out_features}"
    return f"{case.tokens} tokens, {sizes}, {'cold' if case.cold else 'warm'}"


def library_product(case: Case, bench: GpuBench) -> None:
    """The best library product of few tokens: what a fused kernel has to beat."""
    work, operands = products_of(case, bench)
    calls: list[Call] = [partial(torch.mm, rows, weight.t(), out=out) for rows, weight, out in operands]
    builders = {"cublas": lambda: calls, "cublaslt": lambda: [partial(under_lt, call) for call in calls]}
    bench.answer("1: library products of few tokens", what(case), builders, work=work)


def autotuned_product(case: Case, bench: GpuBench) -> None:
    """The same by Inductor's templates."""
    work, operands = products_of(case, bench)

    def build() -> Sequence[Call]:
        run = compiled(COMPILE_MAX, F.linear)
        return [partial(run, rows, weight) for rows, weight, _ in operands]

    bench.answer("1: library products of few tokens", what(case), {COMPILE_MAX: build}, work=work)


def gaps(case: Case, bench: GpuBench) -> None:
    """Time per short kernel in a graph, plain and by programmatic dependent launch; the rates of memory and L2."""
    from benchmarks.harness.gpu import probes

    place = torch.zeros(1, device=bench.device)

    def chain(launch: Callable[[Tensor], None]) -> list[Call]:
        return [partial(launch, place)] * CHAIN

    builders = {"plain": lambda: chain(probes.empty_launch), "dependent launch": lambda: chain(probes.early_launch)}
    assert bench.facts is not None
    rates = {
        "copy_gbps": bench.limits.memory_stream / 1e9,
        "l2_read_gbps": bench.limits.stream(bench.facts["l2_bytes"] // 3) / 1e9,
        "bf16_tflops": bench.limits.product(DTYPE) / 1e12,
    }
    bench.answer("2: time per empty kernel in a graph", "one program, one store", builders, **rates)


def gelu(case: Case, bench: GpuBench) -> None:
    """The library's fused tanh GELU against a product with a pass after it, in both forms."""
    work, operands = products_of(case, bench)
    bias = normal(bench.device, case.config.in_features)

    def with_pass(form: str) -> list[Call]:
        return [
            partial(lambda r, w: F.gelu(torch.addmm(bias, r, w.t()), approximate=form), rows, weight)
            for rows, weight, _ in operands
        ]

    builders = {
        "_addmm_activation (tanh)": lambda: [
            partial(torch._addmm_activation, bias, rows, weight.t(), use_gelu=True) for rows, weight, _ in operands
        ],
        "addmm, then gelu (tanh)": lambda: with_pass("tanh"),
        "addmm, then gelu (erf)": lambda: with_pass("none"),
        "addmm alone": lambda: [partial(torch.addmm, bias, rows, weight.t()) for rows, weight, _ in operands],
    }
    bench.answer("3: GELU in the library's epilogue", what(case), builders, work=work)


def link_sets(case: Case, bench: GpuBench, name: str = FUSED) -> list[Call]:
    """Forwards of the case's link, in as many copies as a cold cell needs."""
    link = make_link(case.config, DTYPE).to(bench.device)
    work = floors.link_forward(case.config, case.tokens, DTYPE.itemsize)
    peers = link_peers(name, link, bench.sets(work.bytes_min, cold=case.cold))
    xs = [normal(bench.device, case.tokens, case.config.in_features, seed=seed) for seed in range(len(peers))]
    return link_calls(peers, xs, [], FORWARD)


def variant(case: Case, bench: GpuBench) -> None:
    """The ways in which Triton may serve a link, a candidate's among them, on shapes where one must be chosen."""
    from benchmarks.gpu.candidates.link import installed
    from recmas_kernels.backends.triton import plan

    def build(way: Callable[[], AbstractContextManager[object]]) -> list[Call]:
        def call(run: Call) -> None:
            with way(), use_backend("triton"):
                run()

        return [partial(call, run) for run in link_sets(case, bench)]

    names = [plan.LIBRARY]
    if case.config.residual != "linear" and case.config.hidden_features <= plan.WIDEST_SMALL:
        names.append(plan.SMALL)
    ways = {name: partial(mock.patch.object, plan, "variant", return_value=name) for name in names}
    builders = {name: partial(build, way) for name, way in ways.items()}
    builders |= {"candidate": partial(build, installed), "eager": partial(link_sets, case, bench, "eager")}
    work = floors.link_forward(case.config, case.tokens, DTYPE.itemsize)
    bench.answer("4: which Triton variant", what(case), builders, work=work)


def dispatch(case: Case, bench: GpuBench) -> None:
    """The backends by name at the sizes between few and many tokens, and what serves without a name."""
    link = make_link(case.config, DTYPE).to(bench.device)
    x = normal(bench.device, case.tokens, case.config.in_features)

    def serves(name: str) -> bool:
        try:
            with use_backend(name):
                link(x)
        except RuntimeError:
            return False
        return True

    def build(name: str) -> list[Call]:
        def call(run: Call) -> None:
            with use_backend(name):
                run()

        return [partial(call, run) for run in link_sets(case, bench)]

    names = [name for name in ("cuda", "triton", "cpu", "reference") if serves(name)]
    assert names, "no backend serves the link"
    work = floors.link_forward(case.config, case.tokens, DTYPE.itemsize)
    builders = {name: partial(build, name) for name in ("auto", *names)}
    bench.answer("5: where few tokens end", what(case), builders, work=work)


def joined_operand(case: Case, bench: GpuBench) -> None:
    """[a | x] [W2 | W3]^T as one product, the copies that join the operands included, against two that accumulate."""
    config, device = case.config, bench.device
    hidden, wide, out = config.hidden_features, config.in_features, config.out_features
    work = floors.product(case.tokens, hidden + wide, out, DTYPE.itemsize)

    def operands(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, x = normal(device, case.tokens, hidden, seed=seed), normal(device, case.tokens, wide, seed=seed + 1)
        return a, x, normal(device, out, hidden, seed=seed + 2), normal(device, out, wide, seed=seed + 3)

    sets = [operands(10 * index) for index in range(bench.sets(work.bytes_min, cold=case.cold))]

    def joined(a: Tensor, x: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return torch.cat([a, x], 1) @ torch.cat([w2, w3], 1).t()

    def twice(a: Tensor, x: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return torch.addmm(a @ w2.t(), x, w3.t())

    builders = {
        "joined": lambda: [partial(joined, *given) for given in sets],
        "two products": lambda: [partial(twice, *given) for given in sets],
    }
    bench.answer("4: the joined operand of an outer link", what(case), builders, work=work)


def in_a_stream(case: Case, bench: GpuBench) -> None:
    """The link between reads of as much as a body reads; the time of the reads alone is to be taken off."""
    bytes_read = BODY_BYTES if bench.facts is not None else 2**20
    body = torch.ones(bytes_read // 4, device=bench.device)

    def stream() -> None:
        body.sum()

    def after(run: Call) -> None:
        stream()
        run()

    def build(name: str) -> list[Call]:
        warm = Case(case.kind, case.tokens, case.config, cold=False)
        return [partial(after, run) for run in link_sets(warm, bench, name)]

    builders = {"reads alone": lambda: [stream], FUSED: partial(build, FUSED), "eager": partial(build, "eager")}
    bench.answer("5: in a body's stream", f"{what(case)}, {bytes_read >> 20} MiB read in between", builders)


TESTS: dict[str, Callable[[Case, GpuBench], None]] = {
    "library product": library_product,
    "max-autotune product": autotuned_product,
    "gaps": gaps,
    "gelu": gelu,
    "variant": variant,
    "dispatch": dispatch,
    "joined operand": joined_operand,
    "in a body's stream": in_a_stream,
}


def test_every_question_of_the_grid_is_asked() -> None:
    assert {case.kind for case in cases(full=True)} == set(TESTS)
