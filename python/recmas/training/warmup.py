"""Warm-up of the outer links: a dictionary between two agents' spaces, before any answer is asked for.

Per edge a -> b, over the tokens of a's own message, h_j the state of a that predicts its token j:

    mean_j  cosine_weight (1 - cos(R_out(R_in(h_j)), e_j)) + mse_weight mean((R_out(R_in(h_j)) - e_j)^2)

e_j is what b would have read as text there: the mean of b's input embeddings over those of b's tokens of the same
message that share a character with a's token j. Neither answers nor the receiver's layers take part. This stage goes
beyond the recipe of the paper; from random outer links the answer's cross entropy alone finds no gradient to follow.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from recmas.agents.agent import Agent
from recmas.config.pattern import Edge
from recmas.config.system_json import edge_name
from recmas.engine.messages import run_link
from recmas.prompts.rows import Fields
from recmas.prompts.targets import target_text
from recmas.system.system import System
from recmas.training.alignment import Cache, Stage, train_apart
from recmas.training.config import WarmupConfig, each_round_count
from recmas.training.data import RowSource, check_plain, is_plain, read_rows
from recmas.training.loop import OnStart, OnStep, TrainingResult
from recmas.training.pairs import Pairs, speak, utterances
from recmas_kernels import alignment_loss

Span = tuple[int, int]


def overlaps(source: Sequence[Span], target: Sequence[Span]) -> list[list[int]]:
    """For each span of ``source``, the indices of the spans of ``target`` that share a character with it.

    Spans are ``(start, end)`` character offsets into one text; empty ones share nothing.
    """
    return [
        [index for index, (first, last) in enumerate(target) if max(start, first) < min(end, last)]
        for start, end in source
    ]


def check_offsets(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer that does not report character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} reports no character offsets; warm-up needs fast tokenizers")


def aligned_tokens(source: Any, target: Any, texts: Sequence[str]) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Which tokens of ``target`` stand for each token of ``source``, in each text.

    Args:
        source: the sender's fast tokenizer.
        target: the receiver's.
        texts: messages.

    Returns:
        Per text and source token, indices into the receiver's tokens of that text (none where either side has only a
        special or unknown token); and the receiver's token ids per text.

    Raises:
        ValueError: a tokenizer that does not report character offsets.
    """
    encoded = []
    for tokenizer in (source, target):
        check_offsets(tokenizer)
        encoding = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        special = set(tokenizer.all_special_ids)
        spans = [
            [(0, 0) if token in special else span for token, span in zip(ids, offsets, strict=True)]
            for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        ]
        encoded.append((encoding["input_ids"], spans))
    (_, source_spans), (target_ids, target_spans) = encoded
    return [overlaps(a, b) for a, b in zip(source_spans, target_spans, strict=True)], target_ids


class Counterparts:
    """What a receiver reads in place of a sender's tokens; of each text, found once.

    Args:
        sender: who says the texts.
        receiver: whose tokens stand for the sender's.
    """

    def __init__(self, sender: Agent, receiver: Agent) -> None:
        self._sender, self._receiver = sender, receiver
        self._known: dict[str, tuple[array[int], array[int]]] = {}

    def embeddings(self, texts: Sequence[str], lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the receiver would read in place of each of the first tokens of each text.

        Args:
            texts: of the sender.
            lengths: tokens of each that count, n in all; an end of message may be among them.

        Returns:
            Mean embeddings ``[found, d]`` (fp32 at least) of those tokens that have a counterpart, in order of text and
            token, and the mask bool ``[n]`` that says which these are; both on the receiver's device.
        """
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            groups, ids = aligned_tokens(self._sender.tokenizer, self._receiver.tokenizer, unknown)
            for text, tokens, receiver_ids in zip(unknown, groups, ids, strict=True):
                flat = array("i", [receiver_ids[member] for members in tokens for member in members])
                self._known[text] = array("i", map(len, tokens)), flat
        sizes: list[int] = []
        members: list[int] = []
        for text, length in zip(texts, lengths, strict=True):
            counts, flat = self._known[text]
            kept = counts[:length].tolist()
            sizes += kept + [0] * (length - len(kept))
            members += flat[: sum(kept)]
        receiver = self._receiver
        size = torch.tensor(sizes, dtype=torch.long, device=receiver.device)
        found = size > 0
        owners = torch.repeat_interleave(size[found])
        embeds = receiver.embed(torch.tensor([members], dtype=torch.long, device=receiver.device))[0]
        embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
        total = embeds.new_zeros(int(found.sum()), embeds.shape[-1]).index_add_(0, owners, embeds)
        return total / size[found][:, None], found


def warmup_loss(
    system: System,
    edge: Edge,
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
    edge: Edge,
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
    counterparts: Counterparts, system: System, edge: Edge, pairs: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sender's latents where a token has a counterpart, and its embeddings, on the receiver's device."""
    sender, receiver = (system.agents[role] for role in edge)
    target, found = counterparts.embeddings(pairs.texts, pairs.lengths)
    hidden = pairs.hidden[found.to(pairs.hidden.device)].to(sender.device)
    return run_link(system.inner_links[edge[0]], hidden).to(receiver.device), target


def _check_alignable(system: System, edge: Edge, rows: Sequence[Fields], config: WarmupConfig) -> None:
    """Raise ValueError where all rows together leave an edge nothing to learn: empty texts, or unknown tokens alone."""
    sender, receiver = edge
    for round in each_round_count(config.rounds):
        for index, row in enumerate(rows):
            text = check_plain(row, index) if is_plain(row) else target_text(row, index, sender, round)
            groups, _ = aligned_tokens(system.agents[sender].tokenizer, system.agents[receiver].tokenizer, [text])
            if any(groups[0][: config.max_tokens]):
                return
    raise ValueError(
        f"no token of what agent {sender!r} says has a counterpart among those of {receiver!r}: "
        f"there is nothing to train {edge_name(edge)} on"
    )


def train_warmup(
    system: System,
    rows: RowSource,
    config: WarmupConfig | None = None,
    *,
    edges: Sequence[Edge] | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    cache: Cache | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> dict[Edge, TrainingResult]:
    """Warm up outer links in place, one edge after the other; everything else, inner links too, stays frozen.

    Args:
        system: whose agents and links these are; inner links trained before.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry the senders' targets,
            or any text (`recmas.training.data`).
        config: settings; None takes the defaults.
        edges: (source, target) pairs to train; None takes every outer link.
        validation: rows, not a callable, whose loss is measured now and then; a run that ends by itself leaves the
            links with the least.
        output: folder of logs and checkpoints, one folder ``warmup-<source>-<target>`` each; None keeps none.
        cache: `PairCache`, or its folder, as for `train_inner`; all edges out of one agent share its pairs.
        resume: go on where the folder's checkpoints stopped.
        progress: show a bar per edge.
        on_step: called after every step with its record; a true answer ends that edge's run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Returns:
        What each edge's run did.

    Raises:
        ValueError: an edge without a link, a slow tokenizer, rows that lack fields or targets, or texts none of whose
            tokens has a counterpart.
    """
    chosen = list(system.outer_links) if edges is None else [(source, target) for source, target in edges]
    for edge in chosen:
        if edge not in system.outer_links:
            known = ", ".join(map(edge_name, system.outer_links)) or "none at all"
            raise ValueError(f"edges: there is no outer link {edge_name(edge)}, only {known}")
        for role in edge:
            check_offsets(system.agents[role].tokenizer)
    config = config or WarmupConfig()
    if isinstance(rows, str | os.PathLike):
        rows = read_rows(rows)
    if not callable(rows):
        for edge in chosen:
            _check_alignable(system, edge, rows, config)
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
        on_step=on_step,
        on_start=on_start,
    )
