"""What the inner stage and the warm-up share: links trained apart from each other, on pairs made anew or cached."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from recmas.config.pattern import LinkKey
from recmas.config.system_json import edge_name
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training import checkpoint
from recmas.training.config import AlignmentConfig, each_round_count
from recmas.training.data import DataSource, RowSource, fixed_batches, pick
from recmas.training.lengths import check_utterances
from recmas.training.link_init import to_identity, to_ridge
from recmas.training.loop import OnStart, OnStep, Run, begins, check_run, results_of, train_in_turn
from recmas.training.pair_cache import PairCache, Plan
from recmas.training.pair_shelf import Place
from recmas.training.pairs import Pairs, Utterance, check_rows, speak, utterances
from recmas.training.processes import processes
from recmas.training.progress import Meter, Shown
from recmas.training.sharding import is_sharded
from recmas.training.step_log import TrainingResult
from recmas.training.teacher import check_trainable, named_parameters, only_trainable
from recmas_kernels import RecursiveLink

Key = TypeVar("Key", bound="str | LinkKey")
Cache = PairCache | str | os.PathLike[str]


@dataclass(frozen=True)
class Stage(Generic[Key]):
    """What distinguishes the stages that align links.

    ``loss`` is called with system, key, pairs and the config's weights; ``examples``, with system, key and pairs, gives
    rows that the link reads and what it should make of them.
    """

    name: str
    loss: Callable[..., torch.Tensor]
    examples: Callable[[System, Key, Pairs], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Batches of a run: how many, and the rows and the round of each; a row comes with what distinguishes it."""

    count: int
    batch: Callable[[int], tuple[Sequence[tuple[Hashable, Fields]], int]]


Batches = Callable[[int], Pairs]
"""The pairs of a schedule's batch."""


def run_name(stage: str, key: str | LinkKey) -> str:
    """The folder of a link's run."""
    return f"{stage}-{key if isinstance(key, str) else edge_name(key).replace('->', '-')}"


def train_apart(
    system: System,
    links: Mapping[Key, RecursiveLink],
    stage: Stage[Key],
    rows: RowSource,
    config: AlignmentConfig,
    *,
    validation: RowSource | None,
    output: str | os.PathLike[str] | None,
    cache: Cache | None,
    resume: bool,
    progress: Shown,
    trackers: Sequence[str],
    on_step: OnStep | None,
    on_start: OnStart | None,
) -> dict[Key, TrainingResult]:
    """Train each link in a run of its own, in folders ``<stage>-<key>``; everything else stays frozen.

    Links that read the same agent's pairs share one pass over these: step by step, each in its turn. Everything is
    checked, the cache too, before the first run begins. A run whose loss is not finite ends by itself; `results_of`
    names it when all others are done.
    """
    source = DataSource(rows, config.batch_size, config.seed)
    schedule, measured = _schedule(source, config), _measured(validation, config)
    check_trainable(system)
    senders = {key: key if isinstance(key, str) else key[0] for key in links}
    names = {key: run_name(stage.name, key) for key in links}
    folders = {key: None if output is None else Path(output, name) for key, name in names.items()}
    trained = {key: named_parameters({name: links[key]}) for key, name in names.items()}
    others = [row for index in range(measured.count) for _, row in measured.batch(index)[0]]
    roles = dict.fromkeys(senders.values())
    for role in roles:
        for checked in (source.rows, others):
            check_rows(system, role, checked, each_round_count(config.rounds))
            check_utterances(system, role, checked, each_round_count(config.rounds), config.max_tokens)
    for key, folder in folders.items():
        check_run(trained[key], config, folder, resume, validated=validation is not None, trackers=trackers)
    if cache is not None and is_sharded(system):
        raise ValueError(
            "cache: one process makes pairs, but layers of sharded agents run in all at once; leave it off"
        )
    planned = _planned(system, roles, [schedule, measured], config, cache, progress)
    if not begins(on_start):
        return {}
    for folder in folders.values():
        if folder is not None:  # so that a run that ends while its pairs are made can be resumed
            folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[Batches]] = {}
    outcomes: dict[Key, TrainingResult | FloatingPointError] = {}
    for keys in _passes(senders, trackers):
        with only_trainable(system, {name: p for key in keys for name, p in trained[key].items()}):
            role = senders[keys[0]]
            if role in planned:
                made[role] = planned.pop(role)()
            batches, others_of = made[role]
            of_steps = batches
            if len(keys) > 1:  # what the first link's step has read is there for the others', at the run's precision
                of_steps = functools.lru_cache(len(processes().share(config.accumulation)))(batches)
            runs = {}
            for key in keys:
                folder = folders[key]
                if folder is None or not checkpoint.checkpoints(folder):
                    pairs = (batches(index) for index in range(schedule.count))
                    _initialise(links[key], config, (stage.examples(system, key, some) for some in pairs))
                weights = {"cosine_weight": config.cosine_weight, "mse_weight": config.mse_weight}
                loss, meter = partial(_loss, system, key, stage, weights), Meter()
                runs[key] = Run(
                    trained[key],
                    partial(_step_loss, loss, of_steps, meter),
                    config,
                    name=names[key],
                    output=folder,
                    resume=resume,
                    progress=progress,
                    trackers=trackers,
                    meter=meter,
                    on_step=on_step,
                    validate=partial(_mean_loss, loss, others_of, measured.count) if measured.count else None,
                    validated_by_all=is_sharded(system),
                )
            outcomes |= train_in_turn(runs)
    return results_of({key: outcomes[key] for key in links})


def _passes(senders: Mapping[Key, str], trackers: Sequence[str]) -> list[list[Key]]:
    """Links that are trained in one pass over the data: those that read the same agent's pairs.

    With trackers each by itself, since some of these know one run at a time.
    """
    if trackers:
        return [[key] for key in senders]
    return [[key for key in senders if senders[key] == role] for role in dict.fromkeys(senders.values())]


def _loss(system: System, key: Any, stage: Stage[Any], weights: Mapping[str, float], pairs: Pairs) -> torch.Tensor:
    return stage.loss(system, key, pairs, **weights)


def _step_loss(
    loss: Callable[[Pairs], torch.Tensor], batches: Batches, meter: Meter, index: int, step: int
) -> torch.Tensor:
    pairs = batches(index)
    meter.add(len(pairs.ids))
    return loss(pairs)


def _mean_loss(loss: Callable[[Pairs], torch.Tensor], batches: Batches, count: int) -> float:
    """Over all batches, weighed by their pairs."""
    total = pairs = 0.0
    for index in range(count):
        batch = batches(index)
        total += loss(batch).item() * len(batch.ids)
        pairs += len(batch.ids)
    return total / pairs


def _initialise(
    link: RecursiveLink, config: AlignmentConfig, examples: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    if config.link_init == "identity":
        to_identity(link)
    elif config.link_init == "ridge":
        to_ridge(link, examples)


def _schedule(source: DataSource, config: AlignmentConfig) -> Schedule:
    def batch(index: int) -> tuple[Sequence[tuple[Hashable, Fields]], int]:
        return source.named_batch(index), pick(config.seed, index // config.accumulation, config.rounds)

    return Schedule(config.steps * config.accumulation, batch)


def _measured(validation: RowSource | None, config: AlignmentConfig) -> Schedule:
    """All validation rows, in every round that may be drawn."""
    rows = [] if validation is None else fixed_batches(validation, config.batch_size)
    batches = [
        ([((number, place), row) for place, row in enumerate(batch)], round)
        for round in each_round_count(config.rounds)
        for number, batch in enumerate(rows)
    ]
    return Schedule(len(batches), batches.__getitem__)


def _planned(
    system: System,
    roles: Iterable[str],
    schedules: Sequence[Schedule],
    config: AlignmentConfig,
    cache: Cache | None,
    progress: Shown,
) -> dict[str, Callable[[], list[Batches]]]:
    """By role, what makes each schedule's batches; cached or not, the texts, their order and so the loss are the same.

    What goes into the cache is checked here, and written when the result is called.
    """
    if cache is None:
        return {role: partial(_fresh, system, role, schedules, config) for role in roles}
    cache = cache if isinstance(cache, PairCache) else PairCache(cache)
    listed = {role: [_listed(system, role, schedule, config) for schedule in schedules] for role in roles}
    plans = cache.plan(system, {role: [one for said, _ in lists for one in said] for role, lists in listed.items()})
    return {role: partial(_cached, plans[role], lists, progress) for role, lists in listed.items()}


def _fresh(system: System, role: str, schedules: Sequence[Schedule], config: AlignmentConfig) -> list[Batches]:
    def pairs(schedule: Schedule, index: int) -> Pairs:
        batch, round = schedule.batch(index)
        said = utterances(system, role, [row for _, row in batch], round, max_tokens=config.max_tokens)
        return speak(system.agents[role], said)

    return [partial(pairs, schedule) for schedule in schedules]


def _cached(plan: Plan, lists: Sequence[tuple[list[Utterance], list[list[int]]]], progress: Shown) -> list[Batches]:
    shelf = plan.fill(progress=progress)

    def pairs(places: Sequence[Place], batches: Sequence[Sequence[int]], index: int) -> Pairs:
        return shelf.pairs([places[number] for number in batches[index]])

    return [partial(pairs, [Place.of(one) for one in said], batches) for said, batches in lists]


def _listed(
    system: System, role: str, schedule: Schedule, config: AlignmentConfig
) -> tuple[list[Utterance], list[list[int]]]:
    """What ``role`` says in a schedule, each once, and which of these every batch has."""
    numbers: dict[tuple[Hashable, int], int] = {}
    said: list[Utterance] = []
    batches: list[list[int]] = []
    for index in range(schedule.count):
        batch, round = schedule.batch(index)
        new = {(name, round): row for name, row in batch if (name, round) not in numbers}
        if new:
            numbers.update({name: len(said) + place for place, name in enumerate(new)})
            said += utterances(system, role, list(new.values()), round, max_tokens=config.max_tokens)
        batches.append([numbers[name, round] for name, _ in batch])
    return said, batches
