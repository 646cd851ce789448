"""The alignment loss with its gradient on a GPU, targets gathered from an embedding table by token id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.gpu.forecast import COMPILE, COMPILE_MAX, ROWS, Forecast
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.timing import Call
from benchmarks.peers.alignment import eager_loss, fused_loss
from benchmarks.peers.link_gpu import compiled
from benchmarks.suites.gpu.link_grid import AUTOTUNED_RANK, AUTOTUNED_SECONDS, PLAIN_SECONDS
from recmas_kernels.testing import check_budget, relative_error

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    tokens: int
    features: int
    vocabulary: int
    rank: int
    peers: tuple[str, ...]
    forecast: Forecast | None = None

    @property
    def seconds(self) -> float:
        return AUTOTUNED_SECONDS if COMPILE_MAX in self.peers else PLAIN_SECONDS

    @property
    def id(self) -> str:
        return f"gpu-alignment-{self.tokens}x{self.features}-{self.rank}"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(64, 128, 512, 7, ("eager",))]
    row = ROWS["cosine T=16384"]
    return [
        Case(16384, 2048, 151_936, 4, ("eager", COMPILE), row),
        Case(16384, 2048, 151_936, AUTOTUNED_RANK + 4, ("eager", COMPILE, COMPILE_MAX), row),
    ]


def test_alignment(case: Case, gpu_bench: GpuBench) -> None:
    device = gpu_bench.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, case.features, generator=generator, device=device).to(DTYPE)

    table = normal(case.vocabulary)
    work = floors.alignment_training(case.tokens, case.features, DTYPE.itemsize)
    count = gpu_bench.sets(work.bytes_min, cold=True)
    preds = [normal(case.tokens).requires_grad_() for _ in range(count)]
    shape = (case.tokens,)
    ids = [torch.randint(case.vocabulary, shape, generator=generator, device=device) for _ in range(count)]
    mask = torch.rand(case.tokens, generator=generator, device=device) > 0.125

    def step(loss_of: Callable[..., Tensor], index: int) -> tuple[Tensor, Tensor]:
        loss = loss_of(preds[index], table, ids[index], mask)
        return loss.detach(), torch.autograd.grad(loss, preds[index])[0]

    exact = preds[0].detach().double().requires_grad_()
    true_loss = eager_loss(exact, table.double(), ids[0], mask)
    (true_grad,) = torch.autograd.grad(true_loss, exact)
    loss, grad = step(fused_loss, 0)
    eager, eager_grad = step(eager_loss, 0)
    check_budget("loss", loss, eager, true_loss.detach(), torch.float32)
    check_budget("gradient", grad, eager_grad, true_grad, DTYPE)
    errors = {FUSED: relative_error(grad, true_grad), "eager": relative_error(eager_grad, true_grad)}

    def build(name: str) -> Sequence[Call]:
        plain = {FUSED: fused_loss, "eager": eager_loss}
        loss_of = plain[name] if name in plain else compiled(name, eager_loss)
        return [partial(step, loss_of, index) for index in range(count)]

    builders = {name: partial(build, name) for name in (FUSED, *case.peers)}
    labels = Labels(
        "alignment", "alignment", f"{case.features}", DTYPE, "forward+backward", case.tokens, cold=True, graph=True
    )
    gpu_bench.measure(labels, builders, work, errors, case.forecast)
