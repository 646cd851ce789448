"""How a batch of prompts is read: on one cache, or as its decoder has proved it can (`recmas.engine.abilities`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recmas.engine.abilities import missing
from recmas.engine.continuation import Continuation, Past, SingleSteps, frequency_switch
from recmas.engine.messages import Prompt
from recmas.engine.rereading import Apart, Rereading, Switching

Prefill = Callable[[PreTrainedModel, Prompt, int, int | None], tuple[Past, Tensor]]
"""``prefill(decoder, prompt, room, context)``: a `Past` that has read the prompt, and the final-norm hidden state
``[B, d]`` at its last position; the other arguments are those of `Continuation`."""


def prefill_all(decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None = None) -> tuple[Past, Tensor]:
    """The plain `Prefill`: the whole prompt at once, into an empty cache."""
    past = begin(decoder, prompt.mask, room, context)
    return past, past.feed(prompt.embeds)


def begin(decoder: PreTrainedModel, mask: Tensor, room: int, context: int | None) -> Past:
    """What prompts of this mask ``[B, T]`` are read with."""
    one = partial(_one_batch, decoder, room=room, context=context)
    switch = frequency_switch(decoder.config)
    make = one if switch is None else partial(Switching, decoder, switch=switch, begin=one)
    if missing_padding(decoder, mask):
        return Apart(decoder, mask, make)
    return make(mask)


def missing_padding(decoder: PreTrainedModel, mask: Tensor) -> str:
    """Why rows of this mask may not run in one batch; empty if they may, or are equally long."""
    return missing(decoder, "padding") if bool((mask == 0).any()) else ""


def forward_groups(decoder: PreTrainedModel, mask: Tensor, after: Tensor) -> list[Tensor]:
    """The rows that may run in one forward, int64 each, of left-padded prompts that right-padded tokens follow.

    Empty where all may: rows of other lengths do not belong together where padding is not proved, nor do rows on two
    sides of a `frequency_switch`.

    Args:
        decoder: body of a transformers model.
        mask: ``[B, T]`` of the prompts.
        after: ``[B, L]`` of what follows.
    """
    lengths, switch = mask.sum(dim=1), frequency_switch(decoder.config)
    apart = lengths if missing_padding(decoder, mask) else torch.zeros_like(lengths)
    side = torch.zeros_like(lengths) if switch is None else (lengths + after.sum(dim=1) - 1 > switch).to(lengths.dtype)
    kinds = 2 * apart + side
    found = [torch.nonzero(kinds == kind)[:, 0] for kind in kinds.unique()]
    return found if len(found) > 1 else []


def uncached(decoder: PreTrainedModel) -> str:
    """Why nothing goes on from a cache of this decoder; empty if it does."""
    return missing(decoder, "cache") or (missing(decoder, "cached gradients") if torch.is_grad_enabled() else "")


def _one_batch(decoder: PreTrainedModel, mask: Tensor, room: int, context: int | None) -> Past:
    if uncached(decoder):
        return Rereading(decoder, mask, context)
    kind = SingleSteps if missing(decoder, "several positions") else Continuation
    return kind(decoder, mask, room, context)
