"""Greedy decoding on a GPU: one captured step, replayed, against the same steps on the growing cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.gpu.bench import GpuBench
from benchmarks.harness.models import random_agent
from recmas.engine.messages import Prompt
from recmas.engine.stepper import Stepper

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    layers: int
    features: int
    vocabulary: int
    prompt: int
    tokens: int
    batch: int
    rank: int
    seconds: float = 25

    @property
    def id(self) -> str:
        return f"gpu-decode-{self.layers}x{self.features}-t{self.prompt}-n{self.tokens}-B{self.batch}"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(2, 64, 256, 12, 6, 2, 9)]
    return [Case(8, 2048, 32_000, 512, 128, 4, 15)]


@torch.no_grad()
def test_decode(case: Case, gpu_bench: GpuBench) -> None:
    device = gpu_bench.device
    agent = random_agent(case.layers, case.features, case.vocabulary).to(device, DTYPE)
    agent.model.generation_config.eos_token_id = None  # every row writes all its tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case.vocabulary, (case.batch, case.prompt), generator=generator).to(device)
    prompt = Prompt(agent.embed(ids), torch.ones_like(ids))
    ways = {
        "graph": Stepper(),
        "growing cache": Stepper(graphs=False),
        "fixed shapes": Stepper(graphs=False, fixed_shapes=True),
    }
    written, seconds = {}, {}
    for name, stepper in ways.items():
        agent.stepper = stepper
        for _ in range(3):  # proofs, compilation and capture end with the second
            seconds[name], written[name] = gpu_bench.seconds_of(lambda: agent.decode(prompt, case.tokens))
    assert written["graph"] == written["fixed shapes"]
    same = sum(row == other for row, other in zip(written["graph"], written["growing cache"], strict=True))
    micros = {name: {"p50": taken / case.tokens * 1e6} for name, taken in seconds.items()}
    gpu_bench.run.answer(
        "6: a token of greedy decoding",
        f"{case.batch} rows, {case.tokens} tokens",
        t_us=micros,
        rows_as_on_the_growing_cache=f"{same} of {case.batch}",
        not_captured=ways["graph"].reason,
    )
