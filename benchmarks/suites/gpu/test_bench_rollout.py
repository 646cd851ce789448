"""The latent rollout on a GPU: `Agent.think` against the reference algorithm, which runs everything again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness import floors
from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.models import random_agent
from benchmarks.harness.names import FUSED, REFERENCE
from benchmarks.harness.record import Labels
from benchmarks.peers.reference_rollout import reference_rollout
from recmas.engine.messages import Prompt
from recmas_kernels import LinkConfig
from recmas_kernels.testing import check_budget, eager_twin, make_link, relative_error

DTYPE = torch.bfloat16
ROUNDS = 5  # one of the reference algorithm takes a second


@dataclass(frozen=True)
class Case:
    layers: int
    features: int
    vocabulary: int
    prompt: int
    steps: int
    batch: int
    rank: int
    seconds: float = 40

    @property
    def id(self) -> str:
        return f"gpu-rollout-{self.layers}x{self.features}-t{self.prompt}-m{self.steps}-B{self.batch}"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(2, 64, 256, 12, 4, 2, 9)]
    return [Case(8, 2048, 32_000, 512, 48, 16, 14), Case(8, 2048, 32_000, 512, 48, 1, 40)]


@torch.no_grad()
def test_rollout(case: Case, gpu_bench: GpuBench) -> None:
    device = gpu_bench.device
    agent = random_agent(case.layers, case.features, case.vocabulary).to(device, DTYPE)
    link = make_link(LinkConfig("inner", *[case.features] * 3, "identity"), DTYPE).to(device)
    eager = eager_twin(link, DTYPE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case.vocabulary, (case.batch, case.prompt), generator=generator).to(device)
    prompt = Prompt(agent.embed(ids), torch.ones_like(ids))

    def fused() -> torch.Tensor:
        return agent.think(prompt, case.steps, link).states

    def reference() -> torch.Tensor:
        return eager(reference_rollout(agent.model, eager, prompt.embeds, prompt.mask, case.steps))

    # A rollout feeds its roundings back, so that only its first latents have an error budget.
    exact = random_agent(case.layers, case.features, case.vocabulary).to(device, torch.float64)
    link64 = eager_twin(link, torch.float64)
    truth = link64(reference_rollout(exact.model, link64, exact.embed(ids), prompt.mask, 1)[:, 0])
    first, plain = fused()[:, 0], reference()[:, 0]
    check_budget("first latents", first, plain, truth, DTYPE)
    error = relative_error(first, truth)
    del exact

    fed = case.prompt + case.steps - 1
    table = agent.model.get_input_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in agent.decoder.parameters()) - table
    attention = 4 * case.layers * case.features * sum(range(1, fed + 1))
    weights = case.steps * DTYPE.itemsize * body
    forward = floors.Work(case.batch * (2 * body * fed + attention), weights, weights)
    steps = floors.link_forward(link.config, case.batch, DTYPE.itemsize) * case.steps
    shape = f"{case.layers} layers, d={case.features}, |V|={case.vocabulary}, m={case.steps}, B={case.batch}"
    labels = Labels("rollout", "think", shape, DTYPE, "forward", case.prompt)
    builders = {FUSED: lambda: [fused], REFERENCE: lambda: [reference]}
    gpu_bench.measure(labels, builders, forward + steps, {FUSED: error}, rounds=ROUNDS, twice=FUSED)
