"""The latent handoff on a GPU: the outer link and the rows it fills, against plain torch and the released loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.floors import Work
from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.gpu.forecast import ROWS, Forecast
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.timing import Call
from recmas_kernels import LinkConfig, RecursiveLink, latent_handoff
from recmas_kernels.testing import check_budget, eager_twin, make_link, relative_error

DTYPE = torch.bfloat16
RELEASED = "as released"


@dataclass(frozen=True)
class Case:
    """A batch whose receivers read ``prompt`` embeddings, ``steps`` of them latents.

    ``graph``: our call and plain torch's as CUDA graphs; else all of them bare, the released loop among them, which
    copies through the host and cannot be recorded.
    """

    config: LinkConfig
    batch: int
    steps: int
    prompt: int
    rank: int
    graph: bool
    forecast: Forecast | None = None
    seconds: float = 8

    @property
    def id(self) -> str:
        return f"gpu-handoff-B{self.batch}-m{self.steps}-{'graph' if self.graph else 'bare'}"


def cases(full: bool) -> list[Case]:
    if not full:
        small = LinkConfig("outer", 64, 96, 48, "linear")
        return [Case(small, 2, 3, 7, 8, graph) for graph in (True, False)]
    config = LinkConfig("outer", 2048, 3072, 1536, "linear", norm=False)
    return [
        Case(config, 32, 48, 128, 5, True, ROWS["handoff B=32 m=48"]),
        Case(config, 32, 48, 128, 13, False, ROWS["handoff B=32 m=48, as released"]),
    ]


def released(link: RecursiveLink, states: Tensor, embeds: Tensor, first: int) -> Tensor:
    """The released loop as an algorithm: sample by sample through the host, concatenated and left padded.

    Args:
        link: the outer link.
        states: latents ``[B, m, d_source]``.
        embeds: the receivers' input embeddings ``[B, T, d]``.
        first: position of the slot's first row.
    """
    mapped = link(states)
    steps, rows = states.shape[1], []
    for sample, embedded in zip(mapped, embeds, strict=True):
        latents = sample.cpu().to(embeds.device)
        rows.append(torch.cat([embedded[:first], latents, embedded[first + steps :]]))
    longest = max(len(row) for row in rows)
    padded = [torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows]
    return torch.stack(padded)


@torch.no_grad()
def test_handoff(case: Case, gpu_bench: GpuBench) -> None:
    device, config = gpu_bench.device, case.config
    link = make_link(config, DTYPE).to(device)
    eager = eager_twin(link, DTYPE)
    generator = torch.Generator(device).manual_seed(0)

    def normal(length: int, features: int) -> Tensor:
        return torch.randn(case.batch, length, features, generator=generator, device=device).to(DTYPE)

    first = case.prompt - case.steps - 1
    slots = torch.arange(case.batch, device=device)[:, None] * case.prompt + torch.arange(
        first, first + case.steps, device=device
    )
    slot_rows = slots.flatten()
    moved = Work(0, 2 * case.batch * case.steps * config.out_features * DTYPE.itemsize)
    work = floors.link_forward(config, case.batch * case.steps, DTYPE.itemsize) + moved
    count = gpu_bench.sets(work.bytes_min, cold=True)
    states = [normal(case.steps, config.in_features) for _ in range(count)]
    embeds = [normal(case.prompt, config.out_features) for _ in range(count)]

    def fused(index: int) -> Tensor:
        return latent_handoff(states[index], link, embeds[index], slot_rows=slot_rows, inplace=True)

    def plain(index: int) -> Tensor:
        rows = eager(states[index]).flatten(0, 1)
        return embeds[index].flatten(0, 1).index_copy_(0, slot_rows, rows).view_as(embeds[index])

    truth = embeds[0].double()
    truth.flatten(0, 1)[slot_rows] = eager_twin(link, torch.float64)(states[0].double()).flatten(0, 1)
    loop = released(eager, states[0], embeds[0], first)
    check_budget("embeddings", fused(0).clone(), plain(0), truth, DTYPE)
    errors = {FUSED: relative_error(fused(0), truth), RELEASED: relative_error(loop, truth)}

    def build(call: Callable[[int], Tensor]) -> Sequence[Call]:
        return [partial(call, index) for index in range(count)]

    builders = {FUSED: partial(build, fused), "eager": partial(build, plain)}
    if not case.graph:
        builders[RELEASED] = partial(build, lambda index: released(eager, states[index], embeds[index], first))
    shape = f"{config.in_features}x{config.hidden_features}x{config.out_features}, B={case.batch}, m={case.steps}"
    tokens = case.batch * case.steps
    labels = Labels("latents", "handoff", shape, DTYPE, "forward", tokens, cold=True, graph=case.graph)
    gpu_bench.measure(labels, builders, work, errors, case.forecast)
