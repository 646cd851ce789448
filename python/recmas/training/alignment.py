"""What the inner stage and the warm-up share: states under gold messages, and links trained apart from each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from recmas.config.pattern import Edge, Pattern, Visit
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.config import AlignmentConfig, each_round_count
from recmas.training.data import DataSource, RowSource, pick, target_texts
from recmas.training.loop import OnStart, OnStep, TrainingResult, check_run, train
from recmas.training.teacher import Speech, check_trainable, force, named_parameters, only_trainable

Key = TypeVar("Key", bound="str | Edge")


def visit_of(pattern: Pattern, role: str, round: int) -> Visit:
    """The visit of ``role`` in the last of ``round`` rounds."""
    for visit in pattern.visits(round):
        if visit.role == role and visit.round == round:
            return visit
    raise ValueError(f"unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")


def gold_messages(pattern: Pattern, role: str, round: int) -> list[tuple[str, int]]:
    """(role, round) of the gold messages that `forced_with_gold` takes: the agent's own and its senders'."""
    visit = visit_of(pattern, role, round)
    return [(role, round), *zip(visit.senders, visit.sender_rounds, strict=True)]


def forced_with_gold(
    system: System, role: str, rows: Sequence[Fields], round: int, *, max_tokens: int | None = None
) -> Speech:
    """The message of ``role`` in ``round``, forced after a prompt that holds its senders' gold messages as text.

    No link takes part, and no gradient is kept.
    """
    visit = visit_of(system.pattern, role, round)
    texts = target_texts(rows, role, round)
    with torch.no_grad():
        senders = zip(visit.senders, visit.sender_rounds, strict=True)
        prompt = system.prompt(visit, rows, {sender: target_texts(rows, sender, at) for sender, at in senders})
        return force(system.agents[role], prompt, texts, max_tokens=max_tokens)


def train_apart(
    system: System,
    links: Mapping[Key, nn.Module],
    loss: Callable[..., torch.Tensor],
    rows: RowSource,
    config: AlignmentConfig,
    *,
    stage: str,
    output: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool,
    on_step: OnStep | None,
    on_start: OnStart | None,
) -> dict[Key, TrainingResult]:
    """Train each link in a run of its own, in folders ``<stage>-<key>``; everything else stays frozen.

    Everything is checked before the first run begins.

    ``loss`` is called as ``inner_loss`` and ``warmup_loss`` are: system, key, rows, round, and the config's weights.
    """
    source = DataSource(rows, config.batch_size, config.seed)
    check_trainable(system)
    names = {key: "-".join([stage, key] if isinstance(key, str) else [stage, *key]) for key in links}
    folders = {key: None if output is None else Path(output, name) for key, name in names.items()}
    trained = {key: named_parameters({name: links[key]}) for key, name in names.items()}
    for key, folder in folders.items():
        role = key if isinstance(key, str) else key[0]
        for round in each_round_count(config.rounds):
            source.check_targets(gold_messages(system.pattern, role, round))
            source.check_fields(system, [visit_of(system.pattern, role, round)])
        if folder is not None:
            check_run(trained[key], config, folder, resume)
    if on_start is not None:
        on_start()
    results: dict[Key, TrainingResult] = {}
    for key, parameters in trained.items():
        loss_of = partial(_batch_loss, system, key, loss, source, config)
        with only_trainable(system, parameters):
            results[key] = train(
                parameters,
                loss_of,
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
    source: DataSource,
    config: AlignmentConfig,
    index: int,
    step: int,
) -> torch.Tensor:
    return loss(
        system,
        key,
        source.batch(index),
        pick(config.seed, step, config.rounds),
        cosine_weight=config.cosine_weight,
        mse_weight=config.mse_weight,
        max_tokens=config.max_tokens,
    )
