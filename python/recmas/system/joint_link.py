"""Several senders in one slot: their latents joined, and the one link that maps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recmas.engine.messages import Latents, run_link


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
    if len({tuple(message.counts()) for message in messages}) > 1:
        raise ValueError("a joint slot needs equally many latent steps from each of its senders")
    return Latents(torch.cat([message.states for message in messages], dim=-1), messages[0].lengths)
