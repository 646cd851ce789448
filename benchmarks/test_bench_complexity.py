"""Proposition 3.1 of arXiv 2604.25917 on the clock: how text and latent turns grow, term by term and as a whole.

`test_bench_handoff.py` counts the same exactly. Here each term is timed while one size varies and the others stand, and
its exponent is fitted beside a free offset; then all terms are fitted at once to whole turns of small models. The
negative control is the reference algorithm's rollout, whose time must grow with the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.models import random_agent
from benchmarks.record import Bench
from benchmarks.reference_rollout import reference_rollout
from benchmarks.scaling import Power, whole
from benchmarks.test_bench_handoff import links
from recmas.agent import Agent
from recmas.splice import Prompt
from recmas_kernels import FusedRecursiveLink, latent_handoff
from recmas_kernels.testing import make_rows

Call = Callable[[], object]
BATCH = 4
WITHIN, R2 = 0.1, 0.995  # of an exponent, and of its fit
CONSTANT, GROWS = 1.1, 1.25  # from the smallest to the largest size: at most, and at least
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """One size varies.

    Attributes:
        name: of what is timed.
        factor: the size that varies.
        expected: its exponent; 0 says that the time stays.
        small, large: sizes of the quick and of the full grid.
        control: the algorithm that must not stay.
    """

    name: str
    factor: str
    expected: int
    small: tuple[int, ...]
    large: tuple[int, ...]
    control: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.factor}".replace(" ", "-").replace("|", "")


# Heads are twice as large as last caches at least, and links see so many rows that arithmetic bounds them.
CASES = (
    Case("text step", "|V|", 1, (256, 512, 1024), (32_000, 64_000, 128_000, 256_000)),
    Case("text step", "d", 1, (32, 64, 128), (256, 512, 1024, 2048)),
    Case("links", "d", 2, (64, 128, 256), (768, 1024, 1536, 2048, 3072)),
    Case("text turn", "m", 1, (2, 4, 8), (8, 16, 32, 64, 128)),
    Case("latent turn", "m", 1, (2, 4, 8), (8, 16, 32, 64, 128)),
    Case("latent turn", "|V|", 0, (256, 512), (8_000, 128_000)),
    Case("reference algorithm's rollout", "|V|", 0, (256, 512), (8_000, 128_000), control=True),
)


def cases(full: bool) -> list[Case]:
    return list(CASES)


def calls_of(case: Case, full: bool) -> dict[int, Call]:
    """What is timed, by size; the sizes that stand are those of the others' middle."""
    sizes = case.large if full else case.small
    features, vocabulary, steps, prompt = (256, 16_000, 8, 16) if full else (64, 256, 2, 4)
    if case.name == "text step":
        if case.factor == "|V|":
            return {size: text_step(size, 512 if full else 32) for size in sizes}
        return {size: text_step(64_000 if full else 256, size) for size in sizes}
    if case.name == "links":
        return {size: both_links(size, 256 if full else 4) for size in sizes}
    if case.factor == "m":
        turn = text_turn if case.name == "text turn" else latent_turn
        agent = random_agent(LAYERS, features, vocabulary)
        return {size: turn(agent, prompt, size) for size in sizes}
    turn = reference_turn if case.control else latent_turn
    return {size: turn(random_agent(LAYERS, features, size), prompt, steps) for size in sizes}


def text_step(vocabulary: int, features: int) -> Call:
    """LM head, choice and embedding of a batch's next tokens."""
    table, rows = make_rows(vocabulary, features), make_rows(BATCH, features, seed=2)
    return lambda: table[(rows @ table.t()).argmax(-1)]


def both_links(features: int, tokens: int) -> Call:
    inner, outer = links(features)
    rows = make_rows(tokens, features)
    return lambda: outer(inner(rows))


def start(agent: Agent, prompt: int) -> Prompt:
    vocabulary = agent.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (BATCH, prompt), generator=torch.Generator().manual_seed(0))
    return Prompt(agent.embed(ids), torch.ones_like(ids))


def text_turn(agent: Agent, prompt: int, steps: int) -> Call:
    return partial(agent.decode, start(agent, prompt), steps)


def latent_turn(agent: Agent, prompt: int, steps: int) -> Call:
    inner, outer = links(agent.hidden_size)
    return partial(_think_and_send, agent, start(agent, prompt), steps, inner, outer)


def _think_and_send(
    agent: Agent, prompt: Prompt, steps: int, inner: FusedRecursiveLink, outer: FusedRecursiveLink
) -> None:
    latents = agent.think(prompt, steps, inner)
    slot_rows = torch.arange(BATCH * steps)
    receiver = torch.zeros(BATCH * steps, agent.hidden_size)
    latent_handoff(latents.states, outer, receiver, slot_rows=slot_rows, inplace=True)


def reference_turn(agent: Agent, prompt: int, steps: int) -> Call:
    inner, _ = links(agent.hidden_size)
    begun = start(agent, prompt)
    return partial(reference_rollout, agent.model, inner, begun.embeds, begun.mask, steps)


def timed(calls: Mapping[Any, Call], rounds: int, warm: bool) -> list[list[float]]:
    """Seconds per call, a list per call; all calls once per round, in changing order.

    With ``warm`` each is called once more before, to bring back what others have driven out of the caches.
    """
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for _ in range(3):  # a weight is packed at its second sighting
        for call in calls.values():
            call()
    for _ in range(rounds):
        for key in order.sample(list(calls), len(calls)):
            if warm:
                calls[key]()
            began = perf_counter()
            calls[key]()
            samples[key].append(perf_counter() - began)
    return list(samples.values())


def record(case: Case, sizes: Sequence[int], samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A fit's record; `report` draws these in a table of their own."""
    medians = [float(np.median(times)) for times in samples]
    growth = medians[-1] / medians[0]
    fit = Power.of(sizes, samples) if case.expected else None
    missed = None
    if fit is not None and (abs(fit.exponent - case.expected) > WITHIN or fit.r2 < R2):
        missed = (
            f"exponent {fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}], R² {fit.r2:.4f}, must be {case.expected}"
        )
    elif fit is None and case.control and growth < GROWS:
        missed = f"the control grows {growth:.2f}x, must at least {GROWS:.2f}x"
    elif fit is None and not case.control and growth > CONSTANT:
        missed = f"grows {growth:.2f}x, must at most {CONSTANT:.2f}x"
    return {
        **labels(case.name, case.factor),
        "factor": case.factor,
        "expected": case.expected,
        "control": case.control,
        "sizes": list(sizes),
        "seconds": medians,
        "growth": growth,
        "fit": None if fit is None else asdict(fit),
        "goal": {"within": WITHIN, "r2": R2},
        "missed": missed,
        "samples_us": [[round(value * 1e6, 2) for value in times] for times in samples],
    }


def labels(op: str, shape: str) -> dict[str, Any]:
    return {
        "suite": "complexity",
        "op": op,
        "shape": f"over {shape}",
        "dtype": "float32",
        "pass": "forward",
        "tokens": BATCH,
        "cache": "warm",
    }


@torch.no_grad()
def test_term(case: Case, bench: Bench) -> None:
    calls = calls_of(case, bench.full)
    samples = bench.benchmark.pedantic(timed, (calls, 15 if bench.full else 2, True))
    made = record(case, list(calls), samples)
    if bench.benchmark.enabled:
        bench.benchmark.extra_info["record"] = made
    if bench.full:
        assert made["missed"] is None, made["missed"]


NAMES = ("1", "m", "m |V| d, text", "m d², links", "t d², body", "m d², body", "(t+m)² d, body")


def terms_of(features: int, vocabulary: int, prompt: int, steps: int, text: bool) -> list[float]:
    """The proposition's terms of one turn, in the order of `NAMES`; a body's steps, one position at a time, apart."""
    square = float(features * features)
    return [
        1.0,
        float(steps),
        float(steps * vocabulary * features * text),
        steps * square * (not text),
        prompt * square,
        steps * square,
        float((prompt + steps) ** 2 * features),
    ]


@torch.no_grad()
def test_whole_turns(bench: Bench) -> None:
    grid = [(256, 8_000), (256, 64_000), (512, 8_000), (512, 64_000)] if bench.full else [(64, 256), (128, 512)]
    prompts, step_counts = ((16, 128, 512), (8, 32)) if bench.full else ((4, 8), (1, 2))
    calls: dict[tuple[int, int, int, int, bool], Call] = {}
    for features, vocabulary in grid:
        agent = random_agent(LAYERS, features, vocabulary)
        for prompt in prompts:
            for steps in step_counts:
                calls[features, vocabulary, prompt, steps, True] = text_turn(agent, prompt, steps)
                calls[features, vocabulary, prompt, steps, False] = latent_turn(agent, prompt, steps)
    samples = bench.benchmark.pedantic(timed, (calls, 5 if bench.full else 1, False))
    found, r2 = whole(NAMES, np.array([terms_of(*point) for point in calls]), samples)
    if not bench.benchmark.enabled:
        return
    medians = dict(zip(calls, (float(np.median(times)) for times in samples), strict=True))
    head = next(term for term in found if term.name == NAMES[2])
    least = 4 / bench.limits.memory_stream  # seconds to read one float32 weight of the head
    missed = None if r2 >= R2 else f"R² {r2:.4f} of the whole model, must be {R2}"
    bench.benchmark.extra_info["record"] = {
        **labels("whole turns", "|V|, d, t and m at once"),
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
