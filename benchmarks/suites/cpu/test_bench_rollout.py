"""The latent rollout: `Agent.think` on its cache against the reference algorithm, which runs everything again.

"fused" is an agent as the runtime loads it on a CPU, from packed weights; the reference runs transformers' layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import body_parameters, random_agent, random_prompt
from benchmarks.harness.names import FUSED, FUSED_PLAIN, REFERENCE
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from benchmarks.peers.reference_rollout import reference_rollout
from recmas_kernels import LinkConfig
from recmas_kernels.testing import eager_twin, make_link, relative_error

pytestmark = pytest.mark.runtime

EQUAL = 1e-5  # of the largest entry, float32
ROUNDS = 3  # one of the reference algorithm takes many seconds
BOUND = TimeBound(all_seconds=60)


@dataclass(frozen=True)
class Case:
    layers: int
    features: int
    vocabulary: int
    prompt: int
    steps: int
    batch: int

    @property
    def id(self) -> str:
        return f"cpu-{self.layers}x{self.features}-V{self.vocabulary}-t{self.prompt}-m{self.steps}-B{self.batch}"


def cases(full: bool) -> list[Case]:
    return [Case(8, 512, 32_000, 300, 32, 4) if full else Case(2, 64, 256, 12, 4, 2)]


def test_rollout(case: Case, bench: Bench) -> None:
    agent = random_agent(case.layers, case.features, case.vocabulary)
    loaded = random_agent(case.layers, case.features, case.vocabulary, accelerate=True)
    link = make_link(LinkConfig("inner", case.features, case.features, case.features, "identity"))
    eager = eager_twin(link, torch.float32)
    prompt = random_prompt(agent, case.batch, case.prompt)
    variants = {
        FUSED: lambda: loaded.think(prompt, case.steps, link).states,
        FUSED_PLAIN: lambda: agent.think(prompt, case.steps, link).states,
        REFERENCE: lambda: reference_rollout(agent.model, eager, prompt.embeds, prompt.mask, case.steps),
    }
    with torch.no_grad():
        truth = eager(variants[REFERENCE]()).double()
        errors = {name: relative_error(variants[name](), truth) for name in (FUSED, FUSED_PLAIN)}
        for name, error in errors.items():
            assert error <= EQUAL, f"{name}: cached and repeated rollout differ by {error:.1e}"

        fed = range(case.prompt + case.steps - 1)
        forward = floors.body_pass(body_parameters(agent), case.layers, case.features, fed, case.batch, case.steps)
        steps = floors.link_forward(link.config, case.batch, 4) * case.steps
        shape = f"{case.layers} layers, d={case.features}, |V|={case.vocabulary}, m={case.steps}, B={case.batch}"
        labels = Labels("rollout", "think", shape, torch.float32, "forward", case.prompt)
        goal = Goal(15.0, 20.0, peer=REFERENCE)
        bench.run(labels, variants, forward + steps, errors, goal, rounds=ROUNDS, twice=None, bound=BOUND)
