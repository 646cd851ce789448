"""The alignment loss with its gradient, targets gathered from an embedding table by token id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.shapes import DTYPES
from benchmarks.peers.alignment import eager_loss, fused_loss
from benchmarks.peers.link import compiled
from recmas_kernels.testing import check_budget, make_rows, poisoned_allocations, relative_error


@dataclass(frozen=True)
class Case:
    tokens: int
    features: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"cpu-{self.tokens}x{self.features}-{str(self.dtype).removeprefix('torch.')}"


def cases(full: bool) -> list[Case]:
    sizes = (16384, 2048, 32768) if full else (64, 128, 512)
    return [Case(*sizes, dtype) for dtype in DTYPES]


def test_alignment(case: Case, bench: Bench) -> None:
    generator = torch.Generator().manual_seed(0)
    pred = make_rows(case.tokens, case.features, dtype=case.dtype).requires_grad_()
    table = make_rows(case.vocabulary, case.features, dtype=case.dtype, seed=2)
    token_ids = torch.randint(case.vocabulary, (case.tokens,), generator=generator)
    mask = torch.rand(case.tokens, generator=generator) > 0.125
    losses = {FUSED: fused_loss, "eager": eager_loss}
    if bench.full:
        losses["compile"] = compiled(eager_loss)

    def step(name: str) -> tuple[Tensor, Tensor]:
        loss = losses[name](pred, table, token_ids, mask)
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    exact = pred.detach().double().requires_grad_()
    true_loss = eager_loss(exact, table.double(), token_ids, mask)
    (true_grad,) = torch.autograd.grad(true_loss, exact)
    with poisoned_allocations():
        loss, grad = step(FUSED)
    eager, eager_grad = step("eager")
    check_budget("loss", loss, eager, true_loss.detach(), torch.float32)
    check_budget("gradient", grad, eager_grad, true_grad, case.dtype)
    again = step(FUSED)
    assert torch.equal(loss, again[0]), "two equal calls gave different losses"
    assert torch.equal(grad, again[1]), "two equal calls gave different gradients"
    errors = {name: relative_error(step(name)[1], true_grad) for name in losses}

    labels = Labels("alignment", "alignment", f"{case.features}", case.dtype, "forward+backward", case.tokens)
    work = floors.alignment_training(case.tokens, case.features, case.dtype.itemsize)
    bench.run(labels, {name: partial(step, name) for name in losses}, work, errors, Goal(5.0, 8.0))
