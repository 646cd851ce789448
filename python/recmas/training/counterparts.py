"""What one agent reads in place of another one's tokens, where their tokenizers cut the same text differently."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from recmas.agents.agent import Agent
from recmas.prompts.rows import Fields
from recmas.prompts.targets import target_text
from recmas.system.system import System
from recmas.training.config import AlignmentConfig, each_round_count
from recmas.training.data import check_plain, is_plain

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
        raise ValueError(
            f"{type(tokenizer).__name__} reports no character offsets, so its tokens cannot be aligned with another "
            "tokenizer's; fast tokenizers report them"
        )


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


def check_alignable(
    system: System, sender: str, receiver: str, link: str, rows: Sequence[Fields], config: AlignmentConfig
) -> None:
    """Raise ValueError where all rows together leave a link nothing to learn: empty texts, or unknown tokens alone."""
    for round in each_round_count(config.rounds):
        for index, row in enumerate(rows):
            text = check_plain(row, index) if is_plain(row) else target_text(row, index, sender, round)
            groups, _ = aligned_tokens(system.agents[sender].tokenizer, system.agents[receiver].tokenizer, [text])
            if any(groups[0][: config.max_tokens]):
                return
    raise ValueError(
        f"no token of what agent {sender!r} says has a counterpart among those of {receiver!r}: "
        f"there is nothing to train {link} on"
    )
