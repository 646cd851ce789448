"""One outer training step through three rounds of three agents against the reference algorithm's: time and memory.

"fused" are agents as the runtime loads them on a CPU: their layers run from packed weights. The reference runs
transformers' layers as they are, and so does "fused, plain agents", which shows what the algorithm alone gains.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import PROMPTS, Setting, body_parameters
from benchmarks.harness.names import FUSED, FUSED_PLAIN, REFERENCE
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from benchmarks.peers.reference_training import recomputing, reference_step
from recmas.training.recursion import outer_losses
from recmas.training.teacher import only_trainable
from recmas_kernels.testing import eager_twin, relative_error

pytestmark = pytest.mark.runtime

FUSED_KEEPING = "fused, keeping activations"
FUSED_BY_ROW = "fused, a row at a time"  # as the reference goes; "fused" takes the micro-batches of a training run
REFERENCE_KEEPING = "reference algorithm, keeping activations"
EQUAL = 1e-5  # of the largest entry of a link's gradients, float32
ROUNDS = 3  # one step takes seconds
SEVERAL = 2  # rows; of more, a step takes so long that the other ways to take it are left out
BOUND = TimeBound(all_seconds=60)


def cases(full: bool) -> list[Setting]:
    if not full:
        return [Setting(2, 64, 256, 12, 4, 6, 3, 2)]
    return [Setting(8, 512, 32_000, 300, 32, 32, 3, batch) for batch in (2, 8)]


class Step:
    """The same step, ours and the reference's; each leaves its gradients in links of its own.

    Ours is of `plain` agents, or of `system`, whose agents are equal and run from packed weights.
    """

    def __init__(self, case: Setting) -> None:
        self.case = case
        self.system, self.rows = case.training(accelerate=True)
        self.plain, _ = case.training()
        self.plain.outer_links.update(self.system.outer_links)
        self.links = {"->".join(edge): link for edge, link in self.system.outer_links.items()}
        self.twins = {name: eager_twin(link, torch.float32) for name, link in self.links.items()}
        self.inner = {role: eager_twin(link, torch.float32) for role, link in self.system.inner_links.items()}
        for link in self.inner.values():
            link.requires_grad_(False)

    def run_ours(self, recompute: bool, micro_batch: int | None = None, plain: bool = False) -> None:
        system = self.plain if plain else self.system
        for link in self.links.values():
            link.zero_grad()
        trained = {f"{name}.{key}": p for name, link in self.links.items() for key, p in link.named_parameters()}
        with only_trainable(system, trained):
            for part in outer_losses(
                system,
                self.rows,
                self.case.rounds,
                latent_steps=self.case.steps,
                recompute=recompute,
                micro_batch=micro_batch,
            ):
                part.backward()
                del part  # as the training loop does

    def run_reference(self, recompute: bool) -> None:
        for link in self.twins.values():
            link.zero_grad()
        with recomputing(self.plain, enabled=recompute):
            links = {**self.twins, **self.inner}
            reference_step(self.plain, links, PROMPTS, self.rows, self.case.rounds, self.case.steps)

    def error(self) -> float:
        """Largest error of a gradient against the reference's, relative to the largest entry of its link's."""
        errors = []
        for name, link in self.links.items():
            ours, theirs = (
                torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
                for module in (link, self.twins[name])
            )
            errors.append(relative_error(ours, theirs.double()))
        return max(errors)


def least_work(step: Step) -> floors.Work:
    """Of a step in which nothing that depends on no link is read twice or differentiated."""
    case, system = step.case, step.system
    body, width, total = body_parameters(system.agents[system.pattern.last]), case.features, floors.Work(0, 0)
    begun: set[str] = set()
    for visit in system.pattern.visits(case.rounds):
        first = 0
        if PROMPTS[visit.role].at(visit.round).startswith("{{question}}"):
            first = case.prompt if visit.role in begun else 0
            begun.add(visit.role)
        written = case.new_tokens if visit.final else min(case.steps, case.new_tokens + 1) - 1
        fed = range(first, case.prompt + (case.steps + 2 if visit.senders else 1) + written)
        total += floors.body_pass(body, case.layers, width, fed, case.batch, passes=1)
        if visit.senders:
            differentiated = range(max(first, case.prompt) if first else 0, fed.stop)
            total += floors.body_backward(body, case.layers, width, differentiated, case.batch)
    answer = case.batch * (case.new_tokens + 1)
    total += floors.vocabulary_step(answer, width, case.vocabulary, 4) * 2
    for source, target in system.outer_links:
        visits = sum(source in visit.senders and target == visit.role for visit in system.pattern.visits(case.rounds))
        latents = case.batch * min(case.steps, case.new_tokens + 1)
        total += floors.link_forward(system.inner_links[source].config, latents, 4) * 2 * visits
        total += floors.link_training(system.outer_links[source, target].config, latents, 4) * visits
    return total


def test_training(case: Setting, bench: Bench) -> None:
    step = Step(case)
    variants = {
        FUSED: partial(step.run_ours, recompute=True),
        FUSED_PLAIN: partial(step.run_ours, recompute=True, plain=True),
        FUSED_KEEPING: partial(step.run_ours, recompute=False),
        FUSED_BY_ROW: partial(step.run_ours, recompute=True, micro_batch=1),
        REFERENCE: partial(step.run_reference, recompute=True),
        REFERENCE_KEEPING: partial(step.run_reference, recompute=False),
    }
    if case.batch > SEVERAL:
        variants = {name: variants[name] for name in (FUSED, FUSED_PLAIN, REFERENCE)}
    variants[REFERENCE]()
    errors = {}
    for name in [name for name in reversed(variants) if name.startswith(FUSED)]:
        variants[name]()
        errors[name] = step.error()
        assert errors[name] <= EQUAL, f"{name}: gradients differ from the reference algorithm's by {errors[name]:.1e}"
    bench.run(
        Labels("training", "outer step", case.shape, torch.float32, "forward+backward", case.prompt),
        variants,
        least_work(step),
        errors,
        Goal(1 / 0.45, 3.0, peer=REFERENCE, must_memory=2.0),
        rounds=ROUNDS,
        bound=BOUND,
        weighed=variants,
        twice=None,
    )
