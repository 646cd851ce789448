"""Choosing the next token of each row, independently of its neighbours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

_GROUP = 128  # divides the vocabularies of most models

RowName = int | tuple[int, ...]
"""What names a row's random stream, after the seed: its number within the run, or several integers."""


class Sampler:
    """Greedy at temperature 0, else nucleus sampling with one random stream per row.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest set of most likely tokens whose probability reaches this, in (0, 1].
        seed: integers that name the run.
        rows: name of each row within the run; (seed, row) alone determine a row's random stream.
    """

    def __init__(self, temperature: float, top_p: float, seed: Sequence[int], rows: Sequence[RowName]) -> None:
        self.temperature, self.top_p, self._rows = temperature, top_p, len(rows)
        names = [(row,) if isinstance(row, int) else row for row in rows] if temperature > 0 else []
        self._streams = [_stream(*seed, *name) for name in names]

    def draw(self, drawing: Collection[int], steps: int = 1) -> Tensor:
        """Numbers in [0, 1), ``[steps, B]`` on the CPU; only the rows in `drawing` use their stream."""
        uniform = torch.zeros(steps, self._rows)
        if self._streams:
            for row in drawing:
                for step in range(steps):  # one by one: a stream does not depend on how many are drawn at once
                    uniform[step, row] = torch.rand((), generator=self._streams[row])
        return uniform

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """`choose` with this temperature and nucleus, for numbers ``[B]`` that were drawn."""
        if self.temperature == 0:
            return choose(logits)
        return choose(logits, uniform.to(logits.device), self.temperature, self.top_p)


def choose(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
) -> Tensor:
    """Token ids int64 ``[B]`` for logits ``[B, vocabulary]``, without waiting for the device.

    -1 where no token is the most likely: NaN among the logits of a row, or nothing but infinities.

    Args:
        logits: of the next token.
        uniform: numbers in [0, 1), ``[B]``, to sample by; None takes the most likely token.
        temperature, top_p: as for `Sampler`; temperature above 0.
    """
    highest, token = _highest(logits)
    if uniform is not None:
        probabilities, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        below = probabilities.cumsum(dim=-1) - probabilities
        kept = torch.where(below < top_p, probabilities, 0.0)
        cumulative = kept.cumsum(dim=-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, threshold, right=True)
        last = (kept > 0).sum(dim=-1, keepdim=True) - 1  # -1 where the row holds NaN
        token = order.gather(1, place.clamp_(max=last).clamp_(min=0)).squeeze(1)
    return torch.where(highest.isfinite(), token, -1)


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, as which a NaN counts, and its first place.

    On a CPU torch finds maxima a vector at a time, but places number by number, so that only the places of a group's
    numbers are looked at: 28 us instead of 55 for 4 rows of 49,152 in float32, 171 instead of 240 for 16 in bfloat16.
    """
    if logits.device.type != "cpu" or logits.shape[-1] % _GROUP != 0:
        return logits.max(dim=-1)
    groups = logits.unflatten(-1, (-1, _GROUP))
    highest, group = groups.amax(dim=-1).max(dim=-1)
    within = groups[torch.arange(len(groups)), group].max(dim=-1).indices
    return highest, group * _GROUP + within


def _stream(*numbers: int) -> torch.Generator:
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
