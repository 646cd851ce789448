"""Greedy decoding on a GPU: one captured step, replayed, against the same steps on the growing cache."""

from __future__ import annotations

import torch

from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.models import random_prompt
from benchmarks.suites.gpu.agent_case import AgentCase
from recmas.engine.stepper import Stepper

SECONDS = 25


def cases(full: bool) -> list[AgentCase]:
    if not full:
        return [AgentCase("decode", 2, 64, 256, 12, 6, 2, 9, SECONDS)]
    return [AgentCase("decode", 8, 2048, 32_000, 512, 128, 4, 15, SECONDS)]


@torch.no_grad()
def test_decode(case: AgentCase, gpu_bench: GpuBench) -> None:
    agent = case.agent(gpu_bench.device)
    agent.model.generation_config.eos_token_id = None  # every row writes all its tokens
    prompt = random_prompt(agent, case.batch, case.prompt)
    ways = {
        "graph": Stepper(),
        "growing cache": Stepper(graphs=False),
        "fixed shapes": Stepper(graphs=False, fixed_shapes=True),
    }
    written, seconds = {}, {}
    for name, stepper in ways.items():
        agent.stepper = stepper
        for _ in range(3):  # proofs, compilation and capture end with the second
            seconds[name], written[name] = gpu_bench.seconds_of(lambda: agent.decode(prompt, case.steps))
    assert written["graph"] == written["fixed shapes"]
    same = sum(row == other for row, other in zip(written["graph"], written["growing cache"], strict=True))
    micros = {name: {"p50": taken / case.steps * 1e6} for name, taken in seconds.items()}
    gpu_bench.run.answer(
        "6: a token of greedy decoding",
        f"{case.batch} rows, {case.steps} tokens",
        t_us=micros,
        rows_as_on_the_growing_cache=f"{same} of {case.batch}",
        not_captured=ways["graph"].reason,
    )
