"""What the inner stage and the warm-up share: links trained apart from each other, on pairs made anew or cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from recmas.config.pattern import Edge
from recmas.system.system import System
from recmas.training.config import AlignmentConfig, each_round_count
from recmas.training.data import DataSource, RowSource, pick
from recmas.training.loop import OnStart, OnStep, TrainingResult, check_run, train
from recmas.training.pair_cache import PairCache, Place, Plan
from recmas.training.pairs import Pairs, Utterance, check_rows, speak, utterances
from recmas.training.teacher import check_trainable, named_parameters, only_trainable

Key = TypeVar("Key", bound="str | Edge")
Cache = PairCache | str | os.PathLike[str]
Batches = Callable[[int, int], Pairs]
"""The pairs of batch ``index`` in ``step``."""


def train_apart(
    system: System,
    links: Mapping[Key, nn.Module],
    loss: Callable[..., torch.Tensor],
    rows: RowSource,
    config: AlignmentConfig,
    *,
    stage: str,
    output: str | os.PathLike[str] | None,
    cache: Cache | None,
    resume: bool,
    progress: bool,
    on_step: OnStep | None,
    on_start: OnStart | None,
) -> dict[Key, TrainingResult]:
    """Train each link in a run of its own, in folders ``<stage>-<key>``; everything else stays frozen.

    Everything is checked, the cache too, before the first run begins.

    ``loss`` is called with system, key, pairs and the config's weights.
    """
    source = DataSource(rows, config.batch_size, config.seed)
    check_trainable(system)
    names = {key: "-".join([stage, key] if isinstance(key, str) else [stage, *key]) for key in links}
    folders = {key: None if output is None else Path(output, name) for key, name in names.items()}
    trained = {key: named_parameters({name: links[key]}) for key, name in names.items()}
    senders = {key: key if isinstance(key, str) else key[0] for key in links}
    roles = dict.fromkeys(senders.values())
    for role in roles:
        check_rows(system, role, source.rows, each_round_count(config.rounds))
    for key, folder in folders.items():
        if folder is not None:
            check_run(trained[key], config, folder, resume)
    planned = _planned(system, roles, source, config, cache, progress)
    if on_start is not None:
        on_start()
    for folder in folders.values():
        if folder is not None:  # so that a run that ends while its pairs are made can be resumed
            folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Batches] = {}
    results: dict[Key, TrainingResult] = {}
    for key, parameters in trained.items():
        role = senders[key]
        with only_trainable(system, parameters):
            if role not in made:
                made[role] = planned.pop(role)()
            results[key] = train(
                parameters,
                partial(_batch_loss, system, key, loss, made[role], config),
                config,
                name=names[key],
                output=folders[key],
                resume=resume,
                progress=progress,
                on_step=on_step,
            )
    return results


def _batch_loss(
    system: System,
    key: str | Edge,
    loss: Callable[..., torch.Tensor],
    batches: Batches,
    config: AlignmentConfig,
    index: int,
    step: int,
) -> torch.Tensor:
    pairs = batches(index, step)
    return loss(system, key, pairs, cosine_weight=config.cosine_weight, mse_weight=config.mse_weight)


def _planned(
    system: System,
    roles: Iterable[str],
    source: DataSource,
    config: AlignmentConfig,
    cache: Cache | None,
    progress: bool,
) -> dict[str, Callable[[], Batches]]:
    """By role, what makes every batch of a run: the same texts in the same order, and so the same loss, cached or not.

    What goes into the cache is checked here, and written when the result is called.
    """
    if cache is None:
        return {role: partial(_fresh, system, role, source, config) for role in roles}
    cache = cache if isinstance(cache, PairCache) else PairCache(cache)
    listed = {role: _listed(system, role, source, config) for role in roles}
    plans = cache.plan(system, {role: said for role, (said, _) in listed.items()})
    return {role: partial(_cached, plans[role], *listed[role], progress) for role in listed}


def _fresh(system: System, role: str, source: DataSource, config: AlignmentConfig) -> Batches:
    def batches(index: int, step: int) -> Pairs:
        round = pick(config.seed, step, config.rounds)
        said = utterances(system, role, source.batch(index), round, max_tokens=config.max_tokens)
        return speak(system.agents[role], said)

    return batches


def _cached(plan: Plan, said: Sequence[Utterance], batches: Sequence[Sequence[int]], progress: bool) -> Batches:
    shelf = plan.fill(progress=progress)
    places = [Place.of(one) for one in said]
    return lambda index, step: shelf.pairs([places[number] for number in batches[index]])


def _listed(
    system: System, role: str, source: DataSource, config: AlignmentConfig
) -> tuple[list[Utterance], list[list[int]]]:
    """What ``role`` says in a run, each once, and which of these every batch has."""
    numbers: dict[tuple[Hashable, int], int] = {}
    said: list[Utterance] = []
    batches: list[list[int]] = []
    for index in range(config.steps * config.accumulation):
        round = pick(config.seed, index // config.accumulation, config.rounds)
        batch = source.named_batch(index)
        new = {(name, round): row for name, row in batch if (name, round) not in numbers}
        if new:
            numbers.update({name: len(said) + place for place, name in enumerate(new)})
            said += utterances(system, role, list(new.values()), round, max_tokens=config.max_tokens)
        batches.append([numbers[name, round] for name, _ in batch])
    return said, batches
