"""The outer stage: all outer links together, by the cross entropy of the answer (`recmas.training.recursion`).

Only outer links (and the weights of joint slots) learn; agents and inner links stay frozen.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from recmas.config.pattern import LinkKey
from recmas.config.system_json import edge_name
from recmas.system.system import System
from recmas.training.config import SAFE_RATE, OuterConfig, each_round_count, weighed_rounds
from recmas.training.data import DataSource, RowSource, fixed_batches, pick
from recmas.training.distillation import check_distill
from recmas.training.lengths import check_unrolled
from recmas.training.loop import OnStart, OnStep, begins, check_run, train
from recmas.training.progress import Meter, Shown
from recmas.training.recursion import outer_losses
from recmas.training.round_norms import rounds_apart
from recmas.training.sharding import is_sharded
from recmas.training.step_log import TrainingResult
from recmas.training.teacher import check_trainable, named_parameters, only_trainable


def trained_edges(system: System, config: OuterConfig, edges: Sequence[LinkKey] | None = None) -> list[LinkKey]:
    """Edges whose links `train_outer` trains: the given ones, or all that the rounds use and that latents pass.

    Raises:
        ValueError: links that the rounds need are missing, or a given edge has no link or passes no latents.
    """
    system.check_run(config.most_rounds)
    steps = system.steps_by_role(config.latent_steps)
    needed = system.outline.links_needed(config.most_rounds)
    passed = [edge for edge in system.outer_links if edge in needed and steps[edge[0]] > 0]
    if not passed:
        raise ValueError("latent_steps: 0 for every agent that sends: no latents, so no link could learn anything")
    chosen = passed if edges is None else list(edges)
    for edge in chosen:
        if edge not in needed:
            known = ", ".join(map(edge_name, sorted(needed)))
            raise ValueError(f"edges: {edge_name(edge)} is not used by {config.most_rounds} rounds, only {known}")
        if steps[edge[0]] == 0:
            raise ValueError(f"edges: {edge_name(edge)} passes no latents: {edge[0]!r} has 0 latent steps")
    return chosen


def train_outer(
    system: System,
    rows: RowSource,
    config: OuterConfig | None = None,
    *,
    edges: Sequence[LinkKey] | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Shown = True,
    trackers: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> TrainingResult:
    """Train outer links in place, all together; agents and inner links stay frozen.

    Args:
        system: whose agents and links these are; inner links trained and outer links warmed up before.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry targets of every agent
            for every round that is unrolled (with ``latents="rollout"`` of the last agent alone, for the rounds that
            count).
        config: settings; None takes the defaults.
        edges: keys of outer links to train; None takes those that ``config.rounds`` rounds use and that latents
            pass: an agent of 0 latent steps sends none.
        validation: rows, not a callable, whose loss is measured now and then; a run that ends by itself leaves the
            links with the least.
        output: folder of the log and the checkpoints; None keeps none.
        resume: go on where the folder's checkpoint stopped.
        progress: show a bar where stderr is a terminal; "always" wherever it goes.
        trackers: names of trackers (`recmas.training.trackers`) that get every step's record.
        on_step: called after every step with its record; a true answer ends the run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Raises:
        ValueError: links that the rounds need are missing, an edge without a link or without latents, or rows that lack
            fields or targets.
    """
    config = config or OuterConfig()
    chosen, steps = trained_edges(system, config, edges), system.steps_by_role(config.latent_steps)
    if config.most_rounds > 1 and config.learning_rate > SAFE_RATE:
        warnings.warn(
            f"learning_rate {config.learning_rate:g} through {config.most_rounds} rounds: more than {SAFE_RATE:g} tends"
            " to destroy the recursion",
            stacklevel=2,
        )
    check_distill(system, config)
    if is_sharded(system) and callable(rows) and config.micro_batch is not None:
        raise ValueError("micro_batch: batches of a callable may differ in size, and sharded agents need equal parts")
    source = DataSource(rows, config.batch_size, config.seed)
    needed_texts: dict[tuple[str, int], None] = {}
    for rounds in each_round_count(config.rounds):
        for visit in system.pattern.visits(rounds):
            if not visit.final and config.latents == "forced" and steps[visit.role] > 0:
                needed_texts[visit.role, visit.round] = None
        for round in weighed_rounds(config.round_weights, rounds):
            needed_texts[system.pattern.last, round] = None
    others = [] if validation is None else fixed_batches(validation, config.batch_size)
    checked = [source] if validation is None else [source, DataSource(validation, config.batch_size, config.seed)]
    for rows_of in checked:
        rows_of.check_targets(needed_texts)
        rows_of.check_fields(system, system.pattern.visits(config.most_rounds))
        check_unrolled(system, rows_of.rows, config)
    check_trainable(system)
    meter = Meter()

    losses = partial(
        outer_losses,
        system,
        latent_steps=config.latent_steps,
        latents=config.latents,
        recompute=config.recompute,
        micro_batch=config.micro_batch,
        round_weights=config.round_weights,
        distill=config.distill,
    )

    def loss(index: int, step: int) -> Iterator[torch.Tensor]:
        return losses(source.batch(index), pick(config.seed, step, config.rounds), meter=meter)

    def validate() -> float:
        """The mean over rows and the round counts that a step may draw."""
        counts, total = each_round_count(config.rounds), 0.0
        for rounds in counts:
            for batch in others:
                total += sum(part.item() for part in losses(batch, rounds)) * len(batch)
        return total / (len(counts) * sum(map(len, others)))

    parameters = named_parameters({edge_name(edge): system.outer_links[edge] for edge in chosen})
    for edge in chosen:
        if edge in system.edge_scores:
            parameters[f"{edge_name(edge)}.score"] = system.edge_scores[edge]
    folder = None if output is None else Path(output, "outer")
    check_run(parameters, config, folder, resume, validated=validation is not None, trackers=trackers)
    if not begins(on_start):
        return TrainingResult(0, [])
    with ExitStack() as stack:
        stack.enter_context(only_trainable(system, parameters))
        apart = stack.enter_context(rounds_apart(system, chosen, config.most_rounds)) if config.round_norms else None
        return train(
            parameters,
            loss,
            config,
            name="outer",
            output=folder,
            resume=resume,
            progress=progress,
            trackers=trackers,
            meter=meter,
            on_step=on_step,
            validate=validate if others else None,
            validated_by_all=is_sharded(system),
            round_norms=apart,
        )
