"""What passes between agents: latents or texts; and the batch of input embeddings that a decoder reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Latents:
    """Latents of one agent for a batch, already through its inner link.

    Attributes:
        states: ``[B, m, d]``, e_1..e_m.
        lengths: int64 ``[B]`` on the CPU where rows use only their first so many states (training); None uses all m.
    """

    states: Tensor
    lengths: Tensor | None = None

    def counts(self) -> list[int]:
        """Number of latents per row of the batch."""
        batch, steps = self.states.shape[:2]
        return [steps] * batch if self.lengths is None else [int(length) for length in self.lengths]

    def to(self, device: torch.device) -> Latents:
        """The same latents on `device`."""
        return Latents(self.states.to(device), self.lengths)


Message = Latents | list[str]
"""What an agent sends: latents, or a text per row of the batch."""


def select(message: Message, rows: Sequence[int]) -> Message:
    """The message of some rows of the batch."""
    if isinstance(message, Latents):
        lengths = None if message.lengths is None else message.lengths[rows]
        return Latents(message.states[rows], lengths)
    return [message[row] for row in rows]


@dataclass
class Prompt:
    """A batch of prompts, left padded.

    Attributes:
        embeds: ``[B, T, d]`` input embeddings; rows at padding hold anything finite.
        mask: int64 ``[B, T]``, 1 where there is input.
        prefix: per row, the token ids before its first slot (all of them where it has none); None if they are not
            known. What a model computes for them does not depend on any message.
    """

    embeds: Tensor
    mask: Tensor
    prefix: Sequence[Sequence[int]] | None = None

    def select(self, rows: Sequence[int]) -> Prompt:
        """Some rows, one at least, without the padding that none of them needs."""
        mask = self.mask[rows]
        first = mask.shape[1] - int(mask.sum(dim=1).max())
        prefix = None if self.prefix is None else [self.prefix[row] for row in rows]
        return Prompt(self.embeds[rows, first:], mask[:, first:], prefix)


def run_link(link: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`link(hidden)` with hidden cast to the link's own dtype first (float32 masters beside a bfloat16 model)."""
    if isinstance(link, nn.Module) and (weight := next(link.parameters(), None)) is not None:
        hidden = hidden.to(weight.dtype)
    return link(hidden)
