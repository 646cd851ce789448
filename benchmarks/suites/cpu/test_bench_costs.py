"""What a training step costs, of links, LoRA and a whole model, on the same rows: the paper's Table 5 in small."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.models import Setting
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from benchmarks.peers.fine_tuning import RANK, FineTuning
from recmas.training import InnerConfig, OuterConfig, inner_loss, train_inner, train_outer
from recmas.training.pairs import utterances

pytestmark = pytest.mark.runtime

FRESH = "fused, texts run anew"
LORA, WHOLE = f"LoRA, rank {RANK}", "full fine-tuning"
SENDER = "planner"
STEPS, ROUNDS = 4, 3  # steps of a call: each begins a run of its own, optimiser and all
BOUND = TimeBound(all_seconds=60)
EQUAL = 1e-5  # of the first loss, float32


def cases(full: bool) -> list[Setting]:
    return [Setting(8, 512, 32_000, 60, 32, 32, 1, 8)] if full else [Setting(2, 64, 256, 12, 4, 6, 1, 2)]


class Costs:
    """A system, its rows, and what fine-tuning one of its agents on them takes."""

    def __init__(self, case: Setting, role: str) -> None:
        self.case = case
        self.system, self.rows = case.training(accelerate=True)
        self.said = utterances(self.system, role, self.rows, 1)
        spare = case.system().agents[role]
        self.peers = {LORA: FineTuning(spare, self.said, RANK), WHOLE: FineTuning(spare, self.said, None)}
        with torch.no_grad():
            lora, whole = (peer.loss().item() for peer in self.peers.values())
        self.error = abs(lora - whole) / whole
        assert self.error <= EQUAL, f"LoRA begins at {lora}, the whole model at {whole}"

    @property
    def tokens(self) -> int:
        """Of one agent's prompts and texts."""
        return sum(len(one.prompt) + len(one.said) for one in self.said)

    def record(self, bench: Bench, op: str, ours: dict, work: floors.Work, errors: dict, parameters: int) -> None:
        variants = ours | {name: lambda peer=peer: peer.steps(STEPS) for name, peer in self.peers.items()}
        counts = {name: sum(p.numel() for p in peer.trained) for name, peer in self.peers.items()}
        bench.run(
            Labels("costs", op, self.case.shape, torch.float32, "forward+backward", self.tokens),
            variants,
            work,
            errors | dict.fromkeys(self.peers, self.error),
            rounds=ROUNDS,
            bound=BOUND,
            calls=STEPS,
            weighed=variants,
            twice=None,
            extra={"trained": dict.fromkeys(ours, parameters) | counts},
        )


def test_costs_of_an_inner_link(case: Setting, bench: Bench, tmp_path: Path) -> None:
    """One agent and its own texts: the link on pairs from disk and on pairs made anew, against the agent itself."""
    costs = Costs(case, SENDER)
    system, rows = costs.system, costs.rows
    config = InnerConfig(steps=STEPS, batch_size=case.batch, checkpoint_every=0)

    def train(cache: Path | None) -> float:
        result = train_inner(system, rows, config, roles=[SENDER], cache=cache, progress=False)
        return result[SENDER].records[0].loss

    link = system.inner_links[SENDER]
    begun, errors = copy.deepcopy(link.state_dict()), {}
    with torch.no_grad():
        expected = inner_loss(system, SENDER, rows).item()
    for name, cache in ((FUSED, tmp_path), (FRESH, None)):
        link.load_state_dict(begun)
        errors[name] = abs(train(cache) - expected) / expected
        assert errors[name] <= EQUAL, f"{name}: the first loss is off by {errors[name]:.1e}"
    said = sum(len(one.said) for one in costs.said)
    costs.record(
        bench,
        "a step of an inner link",
        {FUSED: lambda: train(tmp_path), FRESH: lambda: train(None)},
        floors.link_training(link.config, said, 4),
        errors,
        sum(p.numel() for p in link.parameters()),
    )


def test_costs_of_the_outer_links(case: Setting, bench: Bench) -> None:
    """All outer links of three agents by the answer, against the answering agent, which reads the others' texts."""
    costs = Costs(case, "solver")
    system, rows = costs.system, costs.rows
    config = OuterConfig(steps=STEPS, batch_size=case.batch, rounds=1, latent_steps=case.steps, checkpoint_every=0)
    links = [system.outer_links[edge] for edge in system.pattern.edges(1)]
    latents = case.batch * min(case.steps, case.new_tokens + 1)
    work = floors.Work(0, 0)
    for link in links:
        work += floors.link_training(link.config, latents, 4)
    costs.record(
        bench,
        "a step of the outer links, one round",
        {FUSED: lambda: train_outer(system, rows, config, progress=False)},
        work,
        {},
        sum(p.numel() for link in links for p in link.parameters()),
    )
