"""The latent rollout on a GPU: `Agent.think` against the reference algorithm, which runs everything again."""

from __future__ import annotations

import torch

from benchmarks.harness import floors
from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.models import body_parameters, random_prompt
from benchmarks.harness.names import FUSED, REFERENCE
from benchmarks.harness.record import Labels
from benchmarks.peers.reference_rollout import reference_rollout
from benchmarks.suites.gpu.agent_case import DTYPE, AgentCase
from recmas_kernels import LinkConfig
from recmas_kernels.testing import check_budget, eager_twin, make_link, relative_error

SECONDS = 40
ROUNDS = 5  # one of the reference algorithm takes a second


def cases(full: bool) -> list[AgentCase]:
    if not full:
        return [AgentCase("rollout", 2, 64, 256, 12, 4, 2, 9, SECONDS)]
    ranks = {16: 14, 1: 40}  # by rows
    return [AgentCase("rollout", 8, 2048, 32_000, 512, 48, rows, rank, SECONDS) for rows, rank in ranks.items()]


@torch.no_grad()
def test_rollout(case: AgentCase, gpu_bench: GpuBench) -> None:
    device = gpu_bench.device
    agent = case.agent(device)
    link = make_link(LinkConfig("inner", *[case.features] * 3, "identity"), DTYPE).to(device)
    eager = eager_twin(link, DTYPE)
    prompt = random_prompt(agent, case.batch, case.prompt)

    def fused() -> torch.Tensor:
        return agent.think(prompt, case.steps, link).states

    def reference() -> torch.Tensor:
        return eager(reference_rollout(agent.model, eager, prompt.embeds, prompt.mask, case.steps))

    # A rollout feeds its roundings back, so that only its first latents have an error budget.
    exact = case.agent(device, torch.float64)
    link64 = eager_twin(link, torch.float64)
    exact_prompt = random_prompt(exact, case.batch, case.prompt)
    truth = link64(reference_rollout(exact.model, link64, exact_prompt.embeds, exact_prompt.mask, 1)[:, 0])
    first, plain = fused()[:, 0], reference()[:, 0]
    check_budget("first latents", first, plain, truth, DTYPE)
    error = relative_error(first, truth)
    del exact

    fed, body = range(case.prompt + case.steps - 1), body_parameters(agent)
    forward = floors.body_pass(body, case.layers, case.features, fed, case.batch, case.steps, DTYPE.itemsize)
    steps = floors.link_forward(link.config, case.batch, DTYPE.itemsize) * case.steps
    shape = f"{case.layers} layers, d={case.features}, |V|={case.vocabulary}, m={case.steps}, B={case.batch}"
    labels = Labels("rollout", "think", shape, DTYPE, "forward", case.prompt)
    builders = {FUSED: lambda: [fused], REFERENCE: lambda: [reference]}
    gpu_bench.measure(labels, builders, forward + steps, {FUSED: error}, rounds=ROUNDS, twice=FUSED)
