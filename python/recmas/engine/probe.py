"""A dozen tokens and their hidden states, which proofs compare everything else with.

The truth is a plain forward of embeddings: one batch without padding, cache or positions given. How far a computation
of the same numbers in another order may come from it is measured, not chosen: a third row of that batch is the first
one with every embedding moved by a unit in the last place. What comes of it, the noise, is what one rounding
of the residual stream does to the final states. A decoder of L layers rounds its stream 2L + 1 times (attention,
feed-forward, embedding), independently, so their effects add in squares; the two computations compared both do so; and
of the positions and rows compared the worst counts, for which four standard deviations are allowed:

    bound = 4 sqrt(2 (2L + 1)) max(noise, unit roundoff)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recmas.engine.abilities import stand_in
from recmas.engine.twin import twins

TOKENS = 12
COMMON = 8
"""Tokens with which both rows of the probe begin."""


class Probe:
    """The tokens, embeddings and true states of one decoder.

    Args:
        decoder: body of a transformers model.

    Attributes:
        decoder: one of its `recmas.engine.twin.twins`, which proofs use in its place.
        ids: int64 ``[2, 12]``; both rows begin with the same 8.
        embeds: ``[2, 12, d]``.
        states: ``[2, 12, d]``, the truth.
        bound: relative difference of a state that rounding explains.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.ids = probe_ids(decoder)
        with torch.no_grad():
            embeds: Tensor = decoder.get_input_embeddings()(self.ids)
        for self.decoder in twins(decoder):
            self.embeds = embeds if self.decoder is decoder else embeds.float()
            try:
                states = self._read(torch.cat([self.embeds, moved(self.embeds[:1])]))
                break
            except Exception:
                if self.decoder is decoder:  # then it is no fault of a twin
                    raise
        if self.decoder is not decoder:
            stand_in(self.decoder, decoder)
        self.states = states[:2]
        self.bound = slack(self.decoder) * noise(states[2], states[0])

    @torch.no_grad()
    def _read(self, embeds: Tensor) -> Tensor:
        states: Tensor = self.decoder(inputs_embeds=embeds).last_hidden_state
        return states


def probe_ids(decoder: PreTrainedModel) -> Tensor:
    """Two rows of ordinary tokens, none of which the configuration gives a meaning."""
    weight = decoder.get_input_embeddings().weight
    vocabulary = weight.shape[0]
    special = set(_special(decoder.config.to_dict()))
    ordinary = [token for token in range(min(vocabulary, 4096)) if token not in special] or [0]
    pick = [ordinary[(len(ordinary) // 3 + 7 * number) % len(ordinary)] for number in range(2 * TOKENS - COMMON)]
    rows = [pick[:TOKENS], pick[:COMMON] + pick[TOKENS:]]
    return torch.tensor(rows, device=weight.device)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference (root mean square) of a position's vector; infinite where one is not finite."""
    expected = expected.cpu().double()  # not every device has doubles
    difference = (found.cpu().double() - expected).norm(dim=-1)
    size = expected.norm(dim=-1)
    relative = torch.where(difference == 0, difference, difference / size)
    worst = relative.max().item()
    return worst if math.isfinite(worst) else math.inf


def moved(embeds: Tensor) -> Tensor:
    """The embeddings with every entry moved by a unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, embeds.shape, generator=generator) * 2 - 1).to(embeds.device)
    return (embeds.float() * (1 + torch.finfo(embeds.dtype).eps * signs)).to(embeds.dtype)


def noise(found: Tensor, expected: Tensor) -> float:
    """What moved embeddings change, and a rounding of the states themselves at least."""
    return max(distance(found, expected), torch.finfo(expected.dtype).eps / 2)


def slack(decoder: nn.Module) -> float:
    """Bound over noise; see above."""
    layers = int(getattr(decoder.config, "num_hidden_layers", 0) or 32)
    return 4 * math.sqrt(2 * (2 * layers + 1))


def _special(config: dict[str, Any]) -> list[int]:
    """The numbers of tokens that a configuration names, in all its parts."""
    found: list[int] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _special(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            found += [token for token in _listed(value) if isinstance(token, int)]
    return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
