"""Text against latent handoff over the size of the vocabulary: what proposition 3.1 of arXiv 2604.25917 removes.

A text handoff of m steps runs the LM head, chooses a token and embeds it again, m times. A latent one runs the inner
link m times and the outer link once. The agent's body, which both run, is left out of the times and counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import random_agent, random_prompt, released_links
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.peers.reference_rollout import reference_rollout
from recmas.agents.agent import Agent
from recmas.engine.messages import Prompt
from recmas_kernels import LinkConfig, latent_handoff
from recmas_kernels.testing import check_budget, eager_twin, make_rows, relative_error

TEXT = "text"


@dataclass(frozen=True)
class Case:
    vocabulary: int
    features: int
    steps: int
    batch: int

    @property
    def id(self) -> str:
        return f"cpu-V{self.vocabulary}-d{self.features}-m{self.steps}-B{self.batch}"


def cases(full: bool) -> list[Case]:
    if not full:
        return [Case(512, 64, 3, 2)]
    return [Case(vocabulary, 1024, 16, 4) for vocabulary in (8_000, 16_000, 32_000, 64_000, 128_000)]


@torch.no_grad()
def test_handoff(case: Case, bench: Bench) -> None:
    inner, outer = released_links(case.features)
    table = make_rows(case.vocabulary, case.features) * case.features**-0.5
    hidden = make_rows(case.steps, case.batch, case.features, seed=2)
    slot_rows = torch.arange(case.steps * case.batch)
    receiver = torch.zeros(len(slot_rows), case.features)

    def text() -> Tensor:
        embeds = [table[(rows @ table.t()).argmax(-1)] for rows in hidden]
        receiver.copy_(torch.cat(embeds))
        return receiver

    def latent() -> Tensor:
        states = torch.stack([inner(rows) for rows in hidden])
        return latent_handoff(states, outer, receiver, slot_rows=slot_rows, inplace=True)

    exact = [eager_twin(link, torch.float64) for link in (inner, outer)]
    plain = [eager_twin(link, torch.float32) for link in (inner, outer)]
    rows = hidden.flatten(0, 1)
    truth = exact[1](exact[0](rows.double()))
    check_budget("handed over", latent(), plain[1](plain[0](rows)), truth, torch.float32)
    errors = {FUSED: relative_error(latent(), truth)}

    step = floors.link_forward(inner.config, case.batch, 4)
    work = step * case.steps + floors.link_forward(outer.config, len(slot_rows), 4)
    text_work = floors.vocabulary_step(case.batch, case.features, case.vocabulary, 4) * case.steps
    shape = f"d={case.features}, m={case.steps}, B={case.batch}, |V|={case.vocabulary}"
    labels = Labels("handoff", "latent against text", shape, torch.float32, "forward", len(slot_rows))
    extra = {
        "vocabulary": case.vocabulary,
        "peer_work": {TEXT: {"flops": text_work.flops, "bytes": text_work.bytes_min}},
    }
    bench.run(labels, {FUSED: latent, TEXT: text}, work, errors, Goal(1.0, peer=TEXT), twice=TEXT, extra=extra)


def _link_flops(
    x_shape: Any, w1_shape: Any, b1: Any, w2_shape: Any, b2: Any, w3_shape: Any, *rest: Any, **_: Any
) -> int:
    """Flop formula of the op, since the counter does not look inside: it gets shapes for tensors."""
    residual = "identity" if w3_shape is None else "linear"
    config = LinkConfig("outer", w1_shape[1], w1_shape[0], w2_shape[0], residual, norm=False)
    return floors.link_forward(config, x_shape[0], 4).flops


def count(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, links included."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.recmas.link_fwd: _link_flops})
    with counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Counts:
    """Operations of one agent's turn of m steps: `text` and `latent` beyond the `shared` run of the body."""

    shared: int
    text: int
    latent: int


@torch.no_grad()
def counts(vocabulary: int, features: int, steps: int, prompt: int = 8, batch: int = 2) -> Counts:
    agent: Agent = random_agent(2, features, vocabulary)
    inner, outer = released_links(features)
    start = random_prompt(agent, batch, prompt)
    slot_rows = torch.arange(batch * steps)
    receiver = torch.zeros(batch * steps, features)

    def latent_turn() -> None:
        latents = agent.think(start, steps, inner)
        latent_handoff(latents.states, outer, receiver, slot_rows=slot_rows, inplace=True)

    latent_turn()
    agent.decode(start, steps)  # what an agent proves at its first use is no part of a turn
    shared = count(lambda: agent.think(start, steps, lambda rows: rows))
    text, latent = count(lambda: agent.decode(start, steps)), count(latent_turn)
    return Counts(shared, text - shared, latent - shared)


def exponent(sizes: list[int], values: list[int]) -> float:
    """Slope of log values over log sizes between the ends."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def test_proposition_counted_over_vocabulary() -> None:
    sizes = [512, 1024, 2048, 4096]
    counted = [counts(size, features=64, steps=4) for size in sizes]
    assert exponent(sizes, [c.text for c in counted]) == pytest.approx(1.0, abs=0.01)
    assert exponent(sizes, [c.latent for c in counted]) == pytest.approx(0.0, abs=0.01)
    assert exponent(sizes, [c.shared for c in counted]) == pytest.approx(0.0, abs=0.01)


def test_proposition_counted_over_width() -> None:
    sizes = [64, 128, 256]
    counted = [counts(512, features=size, steps=4) for size in sizes]
    assert exponent(sizes, [c.text for c in counted]) == pytest.approx(1.0, abs=0.01)
    assert exponent(sizes, [c.latent for c in counted]) == pytest.approx(2.0, abs=0.01)


def test_proposition_counted_over_steps() -> None:
    sizes = [2, 4, 8, 16]
    counted = [counts(512, features=64, steps=size) for size in sizes]
    assert exponent(sizes, [c.text for c in counted]) == pytest.approx(1.0, abs=0.01)
    assert exponent(sizes, [c.latent for c in counted]) == pytest.approx(1.0, abs=0.01)


@torch.no_grad()
def test_reference_rollout_pays_for_the_vocabulary() -> None:
    """The negative control: the reference algorithm keeps the term that the proposition removes."""
    features, steps, batch, prompt = 64, 4, 2, 8
    inner, _ = released_links(features)
    ids = torch.zeros(batch, prompt, dtype=torch.int64)
    totals = []
    for vocabulary in (512, 1024):
        agent = random_agent(2, features, vocabulary)
        start = Prompt(agent.embed(ids), torch.ones_like(ids))
        rollout = partial(reference_rollout, agent.model, inner, start.embeds, start.mask, steps)
        totals.append(count(rollout))
    assert totals[1] - totals[0] == floors.vocabulary_step(batch, features, 512, 4).flops * steps
