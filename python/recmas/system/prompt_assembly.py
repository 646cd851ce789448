"""Prompt assembly: token ids become embeddings, and latents go through their outer links into the slots.

The only place in the project that fills a slot: inference, training, lab and benchmarks all assemble prompts here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from recmas.engine.messages import Latents, Prompt, run_link
from recmas.prompts.template import Slot
from recmas_kernels import latent_handoff

Segments = Sequence[list[int] | Slot]


def assemble(
    embed: Callable[[Tensor], Tensor],
    segments: Sequence[Segments],
    latents: Mapping[tuple[str, ...], Latents],
    links: Mapping[tuple[str, ...], Sequence[Callable[[Tensor], Tensor] | None]],
    *,
    pad_id: int,
    device: torch.device | str,
) -> Prompt:
    """Assemble a batch of prompts: one embedding lookup, then one handoff per sender and link.

    Args:
        embed: token ids ``[B, T]`` to embeddings ``[B, T, d]``.
        segments: per row of the batch, token ids and slots in order.
        latents: messages, by the senders of their slot, on the receiver's device.
        links: outer links by the same key, one per row; None for a row without latents of these senders.
        pad_id: token id that fills padding and slots before they are overwritten.
        device: of the receiver.

    Returns:
        Left-padded prompt; a new tensor under grad, so that gradients reach latents and links.

    Raises:
        ValueError: an empty row, a slot without latents, or latents of another batch size.
    """
    for senders, message in latents.items():
        if message.states.shape[0] != len(segments):
            raise ValueError(
                f"{','.join(senders)}: latents of {message.states.shape[0]} rows for {len(segments)} prompts"
            )
    counts = {senders: message.counts() for senders, message in latents.items()}
    laid_out = [_lay_out(row, index, counts, pad_id) for index, row in enumerate(segments)]
    width = max((len(row.ids) for row in laid_out), default=0)
    pads = [width - len(row.ids) for row in laid_out]
    padded = [[pad_id] * pad + row.ids for pad, row in zip(pads, laid_out, strict=True)]
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
    embeds = embed(torch.tensor(padded, device=device))
    for senders, message in latents.items():
        steps = message.states.shape[1]
        for link, rows in _by_link(links[senders]):
            slot_rows: list[int] = []
            source_rows: list[int] = []
            for index in rows:
                for slot_senders, start, count in laid_out[index].slots:
                    if slot_senders == senders:
                        first = index * width + pads[index] + start
                        slot_rows += range(first, first + count)
                        source_rows += range(index * steps, index * steps + count)
            if slot_rows:
                embeds = latent_handoff(
                    message.states,
                    partial(run_link, link),
                    embeds,
                    slot_rows=torch.tensor(slot_rows, device=device),
                    source_rows=torch.tensor(source_rows, device=device),
                    inplace=not torch.is_grad_enabled(),
                )
    return Prompt(embeds, mask, [row.ids[: row.slots[0][1]] if row.slots else row.ids for row in laid_out])


def _by_link(links: Sequence[Callable[[Tensor], Tensor] | None]) -> list[tuple[Callable[[Tensor], Tensor], list[int]]]:
    """Each link, and the rows that go through it."""
    found: dict[int, tuple[Callable[[Tensor], Tensor], list[int]]] = {}
    for row, link in enumerate(links):
        if link is not None:
            found.setdefault(id(link), (link, []))[1].append(row)
    return list(found.values())


class _Row(NamedTuple):
    """One row's ids, with padding ids in its slots; per slot its senders, its first position and its length."""

    ids: list[int]
    slots: list[tuple[tuple[str, ...], int, int]]


def _lay_out(segments: Segments, index: int, counts: Mapping[tuple[str, ...], list[int]], pad_id: int) -> _Row:
    row = _Row([], [])
    for segment in segments:
        if not isinstance(segment, Slot):
            row.ids.extend(segment)
            continue
        if segment.senders not in counts:
            raise ValueError(f"slot {segment} has no latents")
        count = counts[segment.senders][index]
        row.slots.append((segment.senders, len(row.ids), count))
        row.ids.extend([pad_id] * count)
    if not row.ids:
        raise ValueError(f"prompt {index} of the batch is empty")
    return row
