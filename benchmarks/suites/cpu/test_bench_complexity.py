"""Proposition 3.1 of arXiv 2604.25917 on the clock: how text and latent turns grow, term by term and as a whole.

`test_bench_handoff.py` counts the same exactly. Here each term is timed while one size varies and the others do not,
and its exponent is fitted beside a free offset; then all terms are fitted at once to whole turns of small models. The
negative control is the reference algorithm's rollout, whose time must grow with the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.harness.bench import Bench
from benchmarks.harness.growth import BATCH, R2, GrowthCase, growth_labels, growth_record
from benchmarks.harness.models import random_agent, random_prompt, released_links
from benchmarks.harness.scaling import whole
from benchmarks.harness.time_bound import LEAST_ROUNDS
from benchmarks.peers.reference_rollout import reference_rollout
from recmas.agents.agent import Agent
from recmas.engine.messages import Prompt
from recmas_kernels import FusedRecursiveLink, latent_handoff
from recmas_kernels.testing import make_rows

Call = Callable[[], object]
LAYERS = 2
TIMED_SECONDS = 120.0
ROUNDS = 45  # with 15, the interval of the exponent of m was as wide as 0.25


# Heads are twice as large as last caches at least, and links see so many rows that arithmetic bounds them.
CASES = (
    GrowthCase("text step", "|V|", 1, (256, 512, 1024), (32_000, 64_000, 128_000, 256_000)),
    GrowthCase("text step", "d", 1, (64, 128, 256), (256, 512, 1024, 2048)),
    GrowthCase("links", "d", 2, (64, 128, 256), (768, 1024, 1536, 2048, 3072)),
    GrowthCase("text turn", "m", 1, (2, 4, 8), (8, 16, 32, 64, 128)),
    GrowthCase("latent turn", "m", 1, (2, 4, 8), (8, 16, 32, 64, 128)),
    GrowthCase("latent turn", "|V|", 0, (256, 512), (8_000, 128_000)),
    GrowthCase("reference algorithm's rollout", "|V|", 0, (256, 512), (8_000, 128_000), control=True),
)


def cases(full: bool) -> list[GrowthCase]:
    return list(CASES)


def calls_of(case: GrowthCase, full: bool) -> dict[int, Call]:
    """What is timed, by size; the sizes that do not vary have values from the middle of their own ranges."""
    sizes = case.large if full else case.small
    features, vocabulary, steps, prompt = (256, 16_000, 8, 16) if full else (64, 256, 2, 4)
    if case.name == "text step":
        if case.factor == "|V|":
            return {size: text_step(512 if full else 64, size) for size in sizes}
        return {size: text_step(size, 64_000 if full else 256) for size in sizes}
    if case.name == "links":
        return {size: both_links(size, 256 if full else 4) for size in sizes}
    if case.factor == "m":
        turn = text_turn if case.name == "text turn" else latent_turn
        agent = random_agent(LAYERS, features, vocabulary, accelerate=True)
        return {size: turn(agent, prompt, size) for size in sizes}
    turn = reference_turn if case.control else latent_turn
    accelerate = not case.control
    return {size: turn(random_agent(LAYERS, features, size, 0, accelerate), prompt, steps) for size in sizes}


def text_step(features: int, vocabulary: int) -> Call:
    """LM head, choice and embedding of a batch's next tokens, as an agent that is loaded runs them."""
    agent, rows = random_agent(1, features, vocabulary, accelerate=True), make_rows(BATCH, features, seed=2)
    head = agent.model.get_output_embeddings()
    return lambda: agent.embed(head(rows).argmax(-1))


def both_links(features: int, tokens: int) -> Call:
    inner, outer = released_links(features)
    rows = make_rows(tokens, features)
    return lambda: outer(inner(rows))


def start(agent: Agent, prompt: int) -> Prompt:
    return random_prompt(agent, BATCH, prompt)


def text_turn(agent: Agent, prompt: int, steps: int) -> Call:
    return partial(agent.decode, start(agent, prompt), steps)


def latent_turn(agent: Agent, prompt: int, steps: int) -> Call:
    inner, outer = released_links(agent.hidden_size)
    return partial(_think_and_send, agent, start(agent, prompt), steps, inner, outer)


def _think_and_send(
    agent: Agent, prompt: Prompt, steps: int, inner: FusedRecursiveLink, outer: FusedRecursiveLink
) -> None:
    latents = agent.think(prompt, steps, inner)
    slot_rows = torch.arange(BATCH * steps)
    receiver = torch.zeros(BATCH * steps, agent.hidden_size)
    latent_handoff(latents.states, outer, receiver, slot_rows=slot_rows, inplace=True)


def reference_turn(agent: Agent, prompt: int, steps: int) -> Call:
    inner, _ = released_links(agent.hidden_size)
    begun = start(agent, prompt)
    return partial(reference_rollout, agent.model, inner, begun.embeds, begun.mask, steps)


def timed(calls: Mapping[Any, Call], rounds: int, warm: bool) -> list[list[float]]:
    """Seconds per call, a list per call; all calls once per round, in changing order.

    With ``warm`` each is called once more before, so that the caches hold its operands. After
    TIMED_SECONDS no further round begins, if there are LEAST_ROUNDS.
    """
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for _ in range(3):  # the second call may pack weights
        for call in calls.values():
            call()
    end = perf_counter() + TIMED_SECONDS
    for done in range(rounds):
        if done >= LEAST_ROUNDS and perf_counter() > end:
            break
        for key in order.sample(list(calls), len(calls)):
            if warm:
                calls[key]()
            began = perf_counter()
            calls[key]()
            samples[key].append(perf_counter() - began)
    return list(samples.values())


@torch.no_grad()
def test_term(case: GrowthCase, bench: Bench) -> None:
    calls = calls_of(case, bench.full)
    samples = bench.benchmark.pedantic(timed, (calls, ROUNDS if bench.full else 2, True))
    made = growth_record(case, list(calls), samples)
    if bench.benchmark.enabled:
        bench.benchmark.extra_info["record"] = made
    if bench.full:
        assert made["missed"] is None, made["missed"]


NAMES = ("1", "m", "m |V|, choice", "m |V| d, text", "m d², links", "t d², body", "m d², body", "(t+m)² d, body")
HEAD = "m |V| d, text"


def terms_of(features: int, vocabulary: int, prompt: int, steps: int, text: bool) -> list[float]:
    """The terms of one turn, in the order of `NAMES`.

    To the proposition's are added what it leaves out as of lower order, the first three, and a body's steps, which take
    one position at a time, are apart.
    """
    square = float(features * features)
    return [
        1.0,
        float(steps),
        float(steps * vocabulary * text),
        float(steps * vocabulary * features * text),
        steps * square * (not text),
        prompt * square,
        steps * square,
        float((prompt + steps) ** 2 * features),
    ]


@torch.no_grad()
def test_whole_turns(bench: Bench) -> None:
    grid = [(256, 64_000), (256, 128_000), (512, 64_000), (512, 128_000)] if bench.full else [(64, 256), (128, 512)]
    prompts, step_counts = ((16, 128, 512), (8, 32)) if bench.full else ((4, 8), (1, 2))
    calls: dict[tuple[int, int, int, int, bool], Call] = {}
    for features, vocabulary in grid:
        agent = random_agent(LAYERS, features, vocabulary, accelerate=True)
        for prompt in prompts:
            for steps in step_counts:
                calls[features, vocabulary, prompt, steps, True] = text_turn(agent, prompt, steps)
                calls[features, vocabulary, prompt, steps, False] = latent_turn(agent, prompt, steps)
    samples = bench.benchmark.pedantic(timed, (calls, 5 if bench.full else 1, False))
    found, r2 = whole(NAMES, np.array([terms_of(*point) for point in calls]), samples)
    if not bench.benchmark.enabled:
        return
    medians = dict(zip(calls, (float(np.median(times)) for times in samples), strict=True))
    head = next(term for term in found if term.name == HEAD)
    least = 4 / bench.limits.memory_stream  # seconds to read one float32 weight of the head
    missed = None if r2 >= R2 else f"R² {r2:.4f} of the whole model, must be {R2}"
    bench.benchmark.extra_info["record"] = {
        **growth_labels("whole turns", "|V|, d, t and m at once"),
        "terms": [asdict(term) for term in found],
        "head_over_least": head.coefficient / least,
        "r2": r2,
        "turns": [
            {"features": d, "vocabulary": v, "prompt": t, "steps": m, "text": medians[d, v, t, m, True]}
            | {"latent": medians[d, v, t, m, False]}
            for d, v, t, m, text in calls
            if text
        ],
        "goal": {"within": None, "r2": R2},
        "missed": missed,
        "samples_us": [[round(value * 1e6, 2) for value in times] for times in samples],
    }
    if bench.full:
        assert missed is None, missed
