"""The handoff: upstream latents, through their outer links, into the slots of a receiver's prompt.

The only splice in the project: inference, training, lab and benchmarks all assemble prompts here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from recmas.prompts import Slot
from recmas_kernels import latent_handoff

Segments = Sequence[list[int] | Slot]


@dataclass
class Latents:
    """Latents of one agent for a batch, already through its inner link.

    Attributes:
        states: ``[B, m, d]``, e_1..e_m.
        lengths: int64 ``[B]`` on the CPU where rows use only their first so many states (training); None uses all m.
    """

    states: Tensor
    lengths: Tensor | None = None

    def rows(self) -> list[int]:
        """Number of latents per row of the batch."""
        batch, steps = self.states.shape[:2]
        return [steps] * batch if self.lengths is None else [int(length) for length in self.lengths]

    def to(self, device: torch.device) -> Latents:
        """The same latents on `device`."""
        return Latents(self.states.to(device), self.lengths)


@dataclass
class Prompt:
    """A batch of prompts, left padded.

    Attributes:
        embeds: ``[B, T, d]`` input embeddings; rows at padding hold anything finite.
        mask: int64 ``[B, T]``, 1 where there is input.
        prefix: per row, the token ids before its first slot (all of them where it has none); None if they are not
            known. What a model makes of them does not depend on any message.
    """

    embeds: Tensor
    mask: Tensor
    prefix: Sequence[Sequence[int]] | None = None


def run_link(link: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`link(hidden)` with hidden cast to the link's own dtype first (float32 masters beside a bfloat16 model)."""
    if isinstance(link, nn.Module) and (weight := next(link.parameters(), None)) is not None:
        hidden = hidden.to(weight.dtype)
    return link(hidden)


class JointLink(nn.Module):
    """Several senders in one slot: ``sum_i w_i R_out_i(x_i)``, x the concatenation of the x_i along features.

    Args:
        links: outer links of the senders, in slot order.
        widths: features of each x_i.
        weights: ``[len(links)]``, adding up to one.
    """

    def __init__(self, links: Sequence[nn.Module], widths: Sequence[int], weights: Tensor) -> None:
        super().__init__()
        self.links = list(links)  # not registered: the system owns them
        self.widths, self.weights = list(widths), weights

    def forward(self, x: Tensor) -> Tensor:
        parts = [run_link(link, part) for link, part in zip(self.links, x.split(self.widths, dim=-1), strict=True)]
        return torch.einsum("s,s...->...", self.weights.to(parts[0].dtype), torch.stack(parts))


def join(messages: Sequence[Latents]) -> Latents:
    """Latents of several senders as one, concatenated along features, for a `JointLink`.

    Raises:
        ValueError: the senders' latents differ in number; a joint slot needs equally many.
    """
    if len(messages) == 1:
        return messages[0]
    if len({tuple(message.rows()) for message in messages}) > 1:
        raise ValueError("a joint slot needs equally many latent steps from each of its senders")
    return Latents(torch.cat([message.states for message in messages], dim=-1), messages[0].lengths)


def splice(
    embed: Callable[[Tensor], Tensor],
    segments: Sequence[Segments],
    latents: Mapping[tuple[str, ...], Latents],
    links: Mapping[tuple[str, ...], Callable[[Tensor], Tensor]],
    *,
    pad_id: int,
    device: torch.device | str,
) -> Prompt:
    """Assemble a batch of prompts: one embedding lookup, then one handoff per sender.

    Args:
        embed: token ids ``[B, T]`` to embeddings ``[B, T, d]``.
        segments: per row of the batch, token ids and slots in order.
        latents: messages, by the senders of their slot, on the receiver's device.
        links: outer links, by the same key.
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
    counts = {senders: message.rows() for senders, message in latents.items()}
    ids: list[list[int]] = []
    slots: list[list[tuple[tuple[str, ...], int, int]]] = []  # per row: senders, position in the row, number of latents
    for index, row in enumerate(segments):
        row_ids: list[int] = []
        row_slots = []
        for segment in row:
            if not isinstance(segment, Slot):
                row_ids += segment
                continue
            if segment.senders not in latents:
                raise ValueError(f"slot {segment} has no latents")
            count = counts[segment.senders][index]
            row_slots.append((segment.senders, len(row_ids), count))
            row_ids += [pad_id] * count
        if not row_ids:
            raise ValueError(f"prompt {index} of the batch is empty")
        ids.append(row_ids)
        slots.append(row_slots)

    width = max(map(len, ids), default=0)
    pads = [width - len(row_ids) for row_ids in ids]
    padded = torch.tensor([[pad_id] * pad + row_ids for pad, row_ids in zip(pads, ids, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
    embeds = embed(padded)
    for senders, message in latents.items():
        slot_rows: list[int] = []
        source_rows: list[int] = []
        steps = message.states.shape[1]
        for index, row_slots in enumerate(slots):
            for slot_senders, start, count in row_slots:
                if slot_senders == senders:
                    first = index * width + pads[index] + start
                    slot_rows += range(first, first + count)
                    source_rows += range(index * steps, index * steps + count)
        if slot_rows:
            embeds = latent_handoff(
                message.states,
                partial(run_link, links[senders]),
                embeds,
                slot_rows=torch.tensor(slot_rows, device=device),
                source_rows=torch.tensor(source_rows, device=device),
                inplace=not torch.is_grad_enabled(),
            )
    firsts = [row_slots[0][1] if row_slots else len(row_ids) for row_ids, row_slots in zip(ids, slots, strict=True)]
    return Prompt(embeds, mask, [row_ids[:first] for row_ids, first in zip(ids, firsts, strict=True)])
