"""A short outer stage on the task: the solver's cross entropy of the answer, through general links that are there.

The reader is frozen and comes first, so what it thinks of a question depends on no outer link: its hidden states are
read once, however many seeds and steps there are. All else is as `recmas.training.outer` has it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.trio.cells import VALIDATION
from benchmarks.trio.links import EDGE
from benchmarks.trio.rereading import Opening
from recmas import RecursiveMAS
from recmas.agents.targets import target_tokens
from recmas.engine.messages import Latents, run_link
from recmas.lab.notes import questions
from recmas.prompts.rows import Fields
from recmas.training import OuterConfig
from recmas.training.answer import answer_loss
from recmas.training.data import DataSource, fixed_batches, target_texts
from recmas.training.loop import train
from recmas.training.pair_cache import PairCache
from recmas.training.pair_shelf import Place, Shelf
from recmas.training.pairs import Utterance, utterances
from recmas.training.teacher import force, named_parameters, only_trainable

TRAINED, WATCHED = 128, 24
"""Questions of the known half: to train on, and to choose the best step by."""
BATCH = 8


def train_task(
    system: RecursiveMAS, seed: int, steps: int, latent_steps: int, rate: float, cache: Path
) -> dict[str, Any]:
    """Train the outer link in place on questions of the known half; the record of it.

    Args:
        system: the notes system with general links.
        seed: of the order of the questions.
        steps: of the optimiser, each on `BATCH` questions.
        latent_steps: m.
        rate: the learning rate.
        cache: folder of the reader's pairs.
    """
    rows = questions("train", VALIDATION, TRAINED, ["known"])
    watched = questions("validation", VALIDATION, WATCHED, ["known"])
    thoughts = Thoughts(system, [*rows, *watched], latent_steps, cache)
    *_, final = system.pattern.visits(1)
    opening = Opening.of_ids(system.agents["solver"], system.prefix_ids(final, [*rows, *watched]))
    config = OuterConfig(
        steps=steps, batch_size=BATCH, learning_rate=rate, rounds=1, seed=seed, validate_every=max(1, steps // 3)
    )
    source = DataSource(rows, BATCH, seed)

    def validate() -> float:
        with torch.no_grad():
            batches = fixed_batches(watched, 2 * BATCH)
            return sum(loss(system, thoughts, opening, batch).item() * len(batch) for batch in batches) / len(watched)

    parameters = named_parameters({"outer": system.outer_links[EDGE]})
    started = time.perf_counter()
    with only_trainable(system, parameters):
        before = validate()
        result = train(
            parameters,
            lambda index, step: loss(system, thoughts, opening, source.batch(index)),
            config,
            name="outer",
            progress=False,
            validate=validate,
        )
    seen = [before, *(one.validation for one in result.records if one.validation is not None)]
    return {
        "stage": "task",
        "seed": seed,
        "steps": steps,
        "latent steps": latent_steps,
        "learning rate": rate,
        "questions": TRAINED,
        "validation": seen,
        "seconds": time.perf_counter() - started,
    }


class Thoughts:
    """What the reader thinks of each question, under its gold message: its latents, by question.

    Args:
        system: the notes system; its inner link stays as it is.
        rows: questions.
        latent_steps: m, at most as many as the shortest message has tokens.
        cache: folder of the reader's pairs.
    """

    def __init__(self, system: RecursiveMAS, rows: Sequence[Fields], latent_steps: int, cache: Path) -> None:
        self._system, self._steps = system, latent_steps
        plan = PairCache(cache).plan(system, {"reader": self._said(rows)})["reader"]
        self._shelf: Shelf = plan.fill(progress=False)

    def of(self, rows: Sequence[Fields]) -> Latents:
        """The latents ``[B, m, d]`` of these questions."""
        hidden = self._shelf.pairs([Place.of(one) for one in self._said(rows)]).hidden
        agent = self._system.agents["reader"]
        states = hidden.view(len(rows), self._steps, -1).to(agent.device)
        with torch.no_grad():
            return Latents(run_link(self._system.inner_links["reader"], states))

    def _said(self, rows: Sequence[Fields]) -> list[Utterance]:
        return utterances(self._system, "reader", rows, 1, max_tokens=self._steps)


def loss(system: RecursiveMAS, thoughts: Thoughts, opening: Opening, rows: Sequence[Fields]) -> torch.Tensor:
    """Mean cross entropy, a scalar, of the solver's answers' tokens, without their end, which completions lack."""
    solver = system.agents["solver"]
    for turn in system.walk(rows, 1):
        if not turn.visit.final:
            turn.message = thoughts.of(rows)
            continue
        tokens = [ids[:-1] for ids in target_tokens(solver, target_texts(rows, "solver", 1))]
        speech = force(solver, opening.first(turn.prompt), tokens, begun=opening.cache(len(rows)))
        said = speech.mask.bool()
        return answer_loss(solver, speech.hidden[said], speech.ids[said]) / sum(map(len, tokens))
    raise AssertionError("the last visit of a pattern is final")
