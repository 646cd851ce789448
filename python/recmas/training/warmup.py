"""Warm-up of the outer links: a dictionary between two agents' spaces, before any answer is asked for.

Per edge a -> b, over the tokens of a's own message, h_j the state of a that predicts its token j:

    mean_j  cosine_weight (1 - cos(R_out(R_in(h_j)), e_j)) + mse_weight mean((R_out(R_in(h_j)) - e_j)^2)

e_j is what b would have read as text there: the mean of b's input embeddings over those of b's tokens of the same
message that share a character with a's token j. Neither answers nor the receiver's layers take part. This stage goes
beyond the recipe of the paper; from random outer links the answer's cross entropy alone finds no gradient to follow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from recmas.config.pattern import LinkKey
from recmas.config.system_json import edge_name
from recmas.engine.messages import run_link
from recmas.prompts.jsonl import read_rows
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.alignment import Cache, Stage, train_apart
from recmas.training.config import WarmupConfig
from recmas.training.counterparts import Counterparts, check_alignable, check_offsets
from recmas.training.data import RowSource
from recmas.training.loop import OnStart, OnStep
from recmas.training.pairs import Pairs, speak, utterances
from recmas.training.progress import Shown
from recmas.training.step_log import TrainingResult
from recmas_kernels import alignment_loss


def warmup_loss(
    system: System,
    edge: LinkKey,
    rows: Sequence[Fields],
    round: int = 1,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 0.0,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """The loss above over a batch of rows, a scalar; only the edge's outer link receives a gradient.

    End-of-message tokens and others without a counterpart do not count; a batch without any gives zero.
    """
    said = utterances(system, edge[0], rows, round, max_tokens=max_tokens)
    pairs = speak(system.agents[edge[0]], said)
    counterparts = Counterparts(system.agents[edge[0]], system.agents[edge[1]])
    return warmup_alignment(counterparts, system, edge, pairs, cosine_weight=cosine_weight, mse_weight=mse_weight)


def warmup_alignment(
    counterparts: Counterparts,
    system: System,
    edge: LinkKey,
    pairs: Pairs,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 0.0,
) -> torch.Tensor:
    """The loss above over pairs of the edge's sender, a scalar."""
    latents, target = _examples(counterparts, system, edge, pairs)
    pred = run_link(system.outer_links[edge], latents)
    return alignment_loss(pred, target, cosine_weight=cosine_weight, mse_weight=mse_weight)


@torch.no_grad()
def _examples(
    counterparts: Counterparts, system: System, edge: LinkKey, pairs: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sender's latents where a token has a counterpart, and its embeddings, on the receiver's device."""
    sender, receiver = (system.agents[role] for role in edge[:2])
    target, found = counterparts.embeddings(pairs.texts, pairs.lengths)
    hidden = pairs.hidden[found.to(pairs.hidden.device)].to(sender.device)
    return run_link(system.inner_links[edge[0]], hidden).to(receiver.device), target


def train_warmup(
    system: System,
    rows: RowSource,
    config: WarmupConfig | None = None,
    *,
    edges: Sequence[LinkKey] | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    cache: Cache | None = None,
    resume: bool = False,
    progress: Shown = True,
    trackers: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> dict[LinkKey, TrainingResult]:
    """Warm up outer links in place, each in a run of its own; everything else, inner links too, stays frozen.

    Edges out of one agent are trained in turn, step by step, in one pass over its pairs. With trackers it is one edge
    after the other.

    Args:
        system: whose agents and links these are; inner links trained before.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry the senders' targets,
            or any text (`recmas.training.data`).
        config: settings; None takes the defaults.
        edges: keys of outer links to train; None takes every one.
        validation: rows, not a callable, whose loss is measured now and then; a run that ends by itself leaves the
            links with the least.
        output: folder of logs and checkpoints, one folder ``warmup-<source>-<target>`` each; None keeps none.
        cache: `PairCache`, or its folder, as for `train_inner`; all edges out of one agent share its pairs.
        resume: go on where the folder's checkpoints stopped.
        progress: show a bar per edge where stderr is a terminal; "always" wherever it goes.
        trackers: names of trackers (`recmas.training.trackers`) that get every step's record.
        on_step: called after every step with its record; a true answer ends that edge's run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Returns:
        What each edge's run did.

    Raises:
        ValueError: an edge without a link, a slow tokenizer, rows that lack fields or targets, or texts none of whose
            tokens has a counterpart.
        FloatingPointError: the loss of some edges was not finite; the other edges were trained to their ends.
    """
    chosen = list(system.outer_links) if edges is None else list(edges)
    for edge in chosen:
        if edge not in system.outer_links:
            known = ", ".join(map(edge_name, system.outer_links)) or "none at all"
            raise ValueError(f"edges: there is no outer link {edge_name(edge)}, only {known}")
        for role in edge[:2]:
            check_offsets(system.agents[role].tokenizer)
    config = config or WarmupConfig()
    if isinstance(rows, str | os.PathLike):
        rows = read_rows(rows)
    if not callable(rows):
        for edge in chosen:
            check_alignable(system, edge[0], edge[1], edge_name(edge), rows, config)
    counterparts = {edge: Counterparts(system.agents[edge[0]], system.agents[edge[1]]) for edge in chosen}
    return train_apart(
        system,
        {edge: system.outer_links[edge] for edge in chosen},
        Stage(
            "warmup",
            lambda system, edge, pairs, **weights: warmup_alignment(counterparts[edge], system, edge, pairs, **weights),
            lambda system, edge, pairs: _examples(counterparts[edge], system, edge, pairs),
        ),
        rows,
        config,
        validation=validation,
        output=output,
        cache=cache,
        resume=resume,
        progress=progress,
        trackers=trackers,
        on_step=on_step,
        on_start=on_start,
    )
