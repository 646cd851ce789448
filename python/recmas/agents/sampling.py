"""Choosing the next token of each row, independently of its neighbours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

RowName = int | tuple[int, ...]
"""What names a row's random stream, after the seed: its number within the run, or several integers."""


class NotFiniteError(ArithmeticError):
    """Logits that are not finite; `row` is their place in the batch."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} of the batch")
        self.row = row


class Sampler:
    """Greedy at temperature 0, else nucleus sampling with one random stream per row.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest set of most likely tokens whose probability reaches this, in (0, 1].
        seed: integers that name the run.
        rows: name of each row within the run; (seed, row) alone determine a row's random stream.
    """

    def __init__(self, temperature: float, top_p: float, seed: Sequence[int], rows: Sequence[RowName]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._streams = (
            [_stream(*seed, *([row] if isinstance(row, int) else row)) for row in rows] if temperature > 0 else []
        )

    def choose(self, logits: Tensor, drawing: Collection[int]) -> Tensor:
        """Token ids int64 ``[B]`` for logits ``[B, vocabulary]``; only the rows in `drawing` use their stream.

        The ids of the other rows mean nothing.

        Raises:
            NotFiniteError: NaN among a drawing row's logits, or nothing but infinities: no token is the most likely.
        """
        highest, likeliest = logits.max(dim=-1)  # a NaN counts as the highest
        if not (finite := highest.isfinite()).all():
            for row in sorted(drawing):
                if not finite[row]:
                    raise NotFiniteError(row)
        if self._temperature == 0:
            return likeliest
        probabilities, order = (logits.float() / self._temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        below = probabilities.cumsum(dim=-1) - probabilities
        kept = probabilities.masked_fill(below >= self._top_p, 0.0)
        uniform = torch.zeros(len(self._streams))
        for row in drawing:
            uniform[row] = torch.rand((), generator=self._streams[row])
        uniform = uniform.to(logits.device)
        cumulative = kept.cumsum(dim=-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, threshold, right=True)
        last = (kept > 0).sum(dim=-1, keepdim=True) - 1  # -1 where a row that draws nothing holds NaN
        place = place.clamp_(max=last).clamp_(min=0)
        return order.gather(1, place).squeeze(1)


def _stream(*numbers: int) -> torch.Generator:
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
