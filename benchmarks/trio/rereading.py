"""What an agent need not read again: the same notes, whatever links follow, and what all prompts begin with.

Answers are the same but for rounding. Nothing of this is used where turns are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas import Agent
from recmas.engine.cache_snapshot import Snapshot
from recmas.engine.continuation import Past, positions_of
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.messages import Latents, Prompt
from recmas.engine.model_state import ModelStates
from recmas.engine.prefill import Prefill, missing_padding, prefill_all
from recmas.training.unroll import fork


class Rereader(Agent):
    """An agent that keeps what its cache held of each batch that it has thought about."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[tuple[tuple[int, ...], ...], Snapshot] = {}
        self._states = ModelStates()

    def think(
        self,
        prompt: Prompt,
        steps: int,
        link: Callable[[Tensor], Tensor],
        *,
        prefill: Prefill = prefill_all,
        weights_stay: bool = True,
    ) -> Latents:
        """As `Agent.think`; a batch of the very tokens of an earlier one goes on from there."""
        lengths = prompt.mask.sum(dim=1).tolist()
        whole = prompt.prefix is not None and [len(ids) for ids in prompt.prefix] == lengths
        if whole and steps:
            prefill = self._remembering(prefill)
        return super().think(prompt, steps, link, prefill=prefill, weights_stay=weights_stay)

    def _remembering(self, prefill: Prefill) -> Prefill:
        def read(decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None) -> tuple[Past, Tensor]:
            ids, width = prompt.prefix or [], prompt.mask.shape[1]
            key, pads = tuple(map(tuple, ids)), (prompt.mask == 0).sum(dim=1).tolist()
            state = self._states.of(decoder)
            if key not in self._kept or self._kept[key].state is not state:
                self._kept[key] = Snapshot.of(prefill(decoder, prompt, 0, context)[0], state, ids, pads)
            past = self._kept[key].resume(prompt.mask, width - 1, pads, room, context)
            return past, past.feed(prompt.embeds[:, width - 1 :])

        return read

    def hidden(self, prompt: Prompt, targets: Tensor, target_mask: Tensor, begun: DynamicCache | None = None) -> Tensor:
        """As `Agent.hidden`; what all rows begin with is read once for all of them."""
        if begun is None and not torch.is_grad_enabled() and not missing_padding(self.decoder, prompt.mask):
            opening = Opening.of_rows(self, prompt)
            if opening.length:
                prompt, begun = opening.first(prompt), opening.cache(len(prompt.mask))
        return super().hidden(prompt, targets, target_mask, begun)


class Opening:
    """What all prompts of an agent begin with, the examples of the task, read once for all of them.

    Args:
        agent: whose past is keys and values.
        embeds: input embeddings ``[length, d]``.
    """

    def __init__(self, agent: Agent, embeds: Tensor) -> None:
        self.length = len(embeds)
        self._cache = DynamicCache(config=agent.decoder.config)
        if self.length:
            with torch.no_grad():
                mask = torch.ones(1, self.length, dtype=torch.long, device=embeds.device)
                DecoderCall(agent.decoder)(embeds[None], mask, positions_of(mask), self._cache)

    @classmethod
    def of_ids(cls, agent: Agent, ids: Sequence[Sequence[int]]) -> Opening:
        """Of prompts whose token ids up to their first slots, or to their ends, these are."""
        shortest = min(map(len, ids)) - 1  # at least one column of each is left
        length = next((at for at in range(shortest) if len({one[at] for one in ids}) > 1), shortest)
        return cls(agent, agent.embed(torch.tensor([list(ids[0][:length])], device=agent.device))[0])

    @classmethod
    def of_rows(cls, agent: Agent, prompt: Prompt) -> Opening:
        """Of one batch of prompts; of a single one, nothing."""
        pads = (prompt.mask == 0).sum(dim=1).tolist()
        shortest = prompt.mask.shape[1] - max(pads) - 1 if len(pads) > 1 else 0
        rows = torch.stack([row[pad : pad + shortest] for row, pad in zip(prompt.embeds, pads, strict=True)])
        other = (rows != rows[:1]).any(dim=2).any(dim=0).nonzero()
        return cls(agent, rows[0, : int(other[0]) if len(other) else shortest])

    def first(self, prompt: Prompt) -> Prompt:
        """The prompts with their padding behind the common beginning, which then fills the same columns of each."""
        mask, embeds = prompt.mask.clone(), prompt.embeds.clone()
        for row, pad in enumerate((prompt.mask == 0).sum(dim=1).tolist()):
            embeds[row, : self.length] = prompt.embeds[row, pad : pad + self.length].detach()
            mask[row, : self.length] = 1
            mask[row, self.length : self.length + pad] = 0
        return Prompt(embeds, mask)

    def cache(self, rows: int) -> DynamicCache:
        """The keys and values of that beginning, for so many rows."""
        grown = fork(self._cache)
        for layer in grown.layers:
            layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        return grown
