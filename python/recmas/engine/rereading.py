"""Growing batches of models that cannot grow on one cache as they are: read again, apart by length, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recmas.engine.continuation import Past, positions_of
from recmas.engine.decoder_call import DecoderCall


class Rereading(Past):
    """Reads the whole batch again whenever it grows; no cache.

    Args:
        decoder: body of a transformers model.
        mask: int64 ``[B, T]`` of the prompt.
        context: as for `Continuation`.
    """

    def __init__(self, decoder: PreTrainedModel, mask: Tensor, context: int | None = None) -> None:
        self.decoder, self._last = decoder, None if context is None else context - 1
        self._mask, self._read, self._call = mask, torch.empty(0), DecoderCall(decoder)

    @property
    def mask(self) -> Tensor:
        return self._mask

    def feed(self, embeds: Tensor) -> Tensor:
        self._read = torch.cat([self._read, embeds], dim=1) if len(self._read) else embeds
        more = self._read.shape[1] - self._mask.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], max(more, 0))], dim=1)
        return self._call(self._read, self._mask, positions_of(self._mask, self._last))[:, -1]


class Apart(Past):
    """A batch whose rows run in groups of one length each, without padding.

    Args:
        decoder: body of a transformers model.
        mask: int64 ``[B, T]`` of the left-padded prompt.
        begin: a `Past` for rows of one length, from their mask ``[b, t]`` of ones.
    """

    def __init__(self, decoder: PreTrainedModel, mask: Tensor, begin: Callable[[Tensor], Past]) -> None:
        self.decoder, self._mask, self._fed = decoder, mask, 0
        self._groups = [
            (torch.tensor(rows, device=mask.device), begin(mask[rows, mask.shape[1] - length :]), length)
            for length, rows in by_length(mask.sum(dim=1).tolist())
        ]

    @property
    def mask(self) -> Tensor:
        return self._mask

    def feed(self, embeds: Tensor) -> Tensor:
        first, width = self._fed == 0, embeds.shape[1]
        self._fed += width
        if not first:
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], width)], dim=1)
        states: list[Tensor] = []
        for rows, past, length in self._groups:
            states.append(past.feed(embeds[rows, width - length :] if first else embeds[rows]))
        order = torch.cat([rows for rows, _, _ in self._groups]).argsort()
        return torch.cat(states)[order]


class Switching(Past):
    """Rows whose rotary frequencies change when they pass a length (LongRoPE): read again then, apart from the others.

    A row's frequencies are those of its own length, as if it ran alone.

    Args:
        decoder: body of a transformers model.
        mask: int64 ``[B, T]`` of the prompt.
        switch: the longest row of the first frequencies.
        begin: a `Past` for rows that stay on one side, from their mask.
    """

    def __init__(self, decoder: PreTrainedModel, mask: Tensor, switch: int, begin: Callable[[Tensor], Past]) -> None:
        self.decoder, self._switch, self._begin = decoder, switch, begin
        self._mask, self._read, self._past = mask, torch.empty(0), begin(mask)
        self._side: bool | None = None

    @property
    def mask(self) -> Tensor:
        return self._mask

    def feed(self, embeds: Tensor) -> Tensor:
        if self._read.numel():
            self._mask = torch.cat([self._mask, self._mask.new_ones(embeds.shape[:2])], dim=1)
            self._read = torch.cat([self._read, embeds], dim=1)
        else:
            self._read = embeds
        if isinstance(self._past, Apart):
            return self._past.feed(embeds)
        sides = set((self._mask.sum(dim=1) > self._switch).tolist())
        if len(sides) > 1:
            self._past = Apart(self.decoder, self._mask, self._one_length)
            return self._past.feed(self._read)
        before, (self._side,) = self._side, sides
        if before in (None, self._side):
            return self._past.feed(embeds)
        self._past = self._begin(self._mask)
        return self._past.feed(self._read)

    def _one_length(self, mask: Tensor) -> Past:
        return Switching(self.decoder, mask, self._switch, self._begin)


def by_length(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(length, rows of that length), the shortest first."""
    return [(length, [row for row, own in enumerate(lengths) if own == length]) for length in sorted(set(lengths))]
