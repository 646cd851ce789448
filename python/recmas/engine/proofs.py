"""What a decoder must prove before the engine uses it: each proof compares with the plain forward of a `Probe`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recmas.engine.abilities import Proof, proves
from recmas.engine.continuation import Continuation, Past, SingleSteps, positions_of
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.fixed_shapes import FixedShapeContinuation, bucket
from recmas.engine.messages import Prompt
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.engine.probe import COMMON, TOKENS, Probe, distance, moved, noise, slack

FEATURES = {
    "causality": "states before and after a later token was changed",
    "intact inputs": "input embeddings before and after a forward",
    "masks": "states under a mask of ones and under none",
    "positions": "states at given positions and at the model's own",
    "cache": "a cache continued by single positions and one forward",
    "several positions": "a cache continued by several positions at once and one forward",
    "padding": "a left-padded row and the row alone",
    "prefix reuse": "a prompt continued from a kept prefix and one forward",
    "cached gradients": "gradients through a continued cache and through one forward",
    "fixed shapes": "steps at fixed shapes and one forward",
}
"""What each proof compares; the states of both differ, or do not."""
SHORT = 5
"""Tokens of the padded row, beside one of COMMON."""
ROWS = (0, 1, 0)
"""Rows of the probe in a batch of three."""


@proves("causality", "intact inputs", "masks", "positions")
@torch.no_grad()
def _calling(decoder: PreTrainedModel) -> dict[str, Proof]:
    """What every way of running a decoder needs to know of it."""
    probe = Probe(decoder)
    mask, given = torch.ones_like(probe.ids), probe.embeds.clone()

    def states(**passed: bool) -> tuple[Tensor, Tensor]:
        return DecoderCall(probe.decoder, copies=True, **passed)(probe.embeds, mask, positions_of(mask)), probe.states

    def inputs() -> tuple[Tensor, Tensor]:
        DecoderCall(probe.decoder, copies=False, mask=False, positions=False)(given, mask, mask)
        return given, probe.embeds

    return {
        "causality": _compare(probe, "causality", lambda: (probe.states[1, :COMMON], probe.states[0, :COMMON])),
        "intact inputs": _compare(probe, "intact inputs", inputs),
        "masks": _compare(probe, "masks", partial(states, mask=True, positions=False)),
        "positions": _compare(probe, "positions", partial(states, mask=False, positions=True)),
    }


@proves("cache", "several positions", "padding")
@torch.no_grad()
def _continuing(decoder: PreTrainedModel) -> dict[str, Proof]:
    """All three at once, which is how they are used; one by one only where that fails."""
    probe = Probe(decoder)
    features = ("cache", "several positions", "padding")
    together = _compare(probe, "cache", partial(_grown, probe, Continuation, padded=True, width=2))
    if together.holds:
        return {feature: Proof(True, together.error, together.bound, FEATURES[feature]) for feature in features}
    cache = _compare(probe, "cache", partial(_grown, probe, SingleSteps, padded=False, width=1))
    several = _compare(probe, "several positions", partial(_grown, probe, Continuation, padded=False, width=2))
    if not cache.holds:
        padding = _compare(probe, "padding", partial(_padded, probe))
    else:
        kind = Continuation if several.holds else SingleSteps
        padding = _compare(probe, "padding", partial(_grown, probe, kind, padded=True, width=2))
    return {"cache": cache, "several positions": several, "padding": padding}


@proves("cached gradients")
def _differentiating(decoder: PreTrainedModel) -> dict[str, Proof]:
    """The gradient of a state that arrives at the embeddings before it, as rollouts in training need it."""
    probe = Probe(decoder)
    read = torch.cat([probe.embeds, moved(probe.embeds[:1])])
    weight = torch.randn(read.shape[-1], generator=torch.Generator().manual_seed(1)).to(read)
    plain = _gradient(probe, read, weight, grown=False)
    bound = slack(probe.decoder) * noise(plain[2:], plain[:1])

    def compute() -> tuple[Tensor, Tensor]:
        return _gradient(probe, read, weight, grown=True)[:2], plain[:2]

    return {"cached gradients": _compare(probe, "cached gradients", compute, bound)}


def _gradient(probe: Probe, read: Tensor, weight: Tensor, *, grown: bool) -> Tensor:
    """``[B, T, d]``, of the last state of rows ``[B, T, d]``, two positions of which are grown or not."""
    embeds, mask = read.detach().requires_grad_(), read.new_ones(read.shape[:2], dtype=torch.int64)
    with torch.enable_grad():
        if grown:
            past = SingleSteps(probe.decoder, mask[:, :-2], 2)
            past.feed(embeds[:, :-2])
            state = past.feed(embeds[:, -2:])
        else:
            state = DecoderCall(probe.decoder)(embeds, mask, positions_of(mask))[:, -1]
        (gradient,) = torch.autograd.grad((state * weight).sum(), embeds)
    return gradient


@proves("prefix reuse")
@torch.no_grad()
def _reusing(decoder: PreTrainedModel) -> dict[str, Proof]:
    return {"prefix reuse": _compare(probe := Probe(decoder), "prefix reuse", partial(_resumed, probe))}


@proves("fixed shapes")
@torch.no_grad()
def _fixing(decoder: PreTrainedModel) -> dict[str, Proof]:
    return {"fixed shapes": _compare(probe := Probe(decoder), "fixed shapes", partial(_fixed, probe))}


def _compare(
    probe: Probe, feature: str, compute: Callable[[], tuple[Tensor, Tensor]], bound: float | None = None
) -> Proof:
    """The proof of `compute`, which returns vectors ``[..., d]`` and the true ones; None is the probe's own bound."""
    try:
        found, expected = compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises where it cannot be used so
        return Proof.raised(error)
    return Proof.of(distance(found, expected), probe.bound if bound is None else bound, FEATURES[feature])


def _grown(probe: Probe, kind: type[Continuation], *, padded: bool, width: int) -> tuple[Tensor, Tensor]:
    """Both rows read, then grown by `width` positions and by two single ones."""
    lengths = [COMMON, SHORT] if padded else [COMMON, COMMON]
    embeds, mask = _left_padded(probe, lengths)
    past: Past = kind(probe.decoder, mask, TOKENS)
    found, expected = [past.feed(embeds)], [_at(probe, lengths)]
    for more in (width, 1, 1):
        fed = [probe.embeds[row, length : length + more] for row, length in enumerate(lengths)]
        lengths = [length + more for length in lengths]
        found.append(past.feed(torch.stack(fed)))
        expected.append(_at(probe, lengths))
    return torch.stack(found), torch.stack(expected)


def _padded(probe: Probe) -> tuple[Tensor, Tensor]:
    """Both rows in one forward, without a cache."""
    lengths = [COMMON, SHORT]
    embeds, mask = _left_padded(probe, lengths)
    return DecoderCall(probe.decoder)(embeds, mask, positions_of(mask))[:, -1], _at(probe, lengths)


def _resumed(probe: Probe) -> tuple[Tensor, Tensor]:
    """Two visits of a ragged batch; the prompts of the second begin as those of the first.

    A row that is padded otherwise in the second visit moves its keys; recurrent states cannot, so they are asked for
    the same padding again.
    """
    known = [probe.ids[row, :count].tolist() for row, count in zip(ROWS, (5, 4, 1), strict=True)]
    for visits in (((10, 6, 2), (10, 7, 2)), ((10, 6, 2), (10, 6, 2))):
        reuse = PrefixReuse(proved=True)
        for lengths, upcoming in zip(visits, (lambda: known, None), strict=True):
            prompt = Prompt(*_left_padded(probe, lengths, ROWS), known)
            past, hidden = reuse.prefill("probe", upcoming)(probe.decoder, prompt, 2, None)
        if reuse.last.computed < reuse.last.positions:
            step = torch.stack([probe.embeds[row, [length]] for row, length in zip(ROWS, lengths, strict=True)])
            after = [length + 1 for length in lengths]
            return torch.stack([hidden, past.feed(step)]), torch.stack(
                [_at(probe, lengths, ROWS), _at(probe, after, ROWS)]
            )
    raise ValueError(reuse.last.reason)


def _fixed(probe: Probe) -> tuple[Tensor, Tensor]:
    """Both rows read into a growing cache, then two steps in a bucket."""
    lengths = [COMMON, SHORT]
    embeds, mask = _left_padded(probe, lengths)
    past = Continuation(probe.decoder, mask, 2)
    past.feed(embeds)
    fixed = FixedShapeContinuation(past, *bucket(len(lengths), TOKENS))
    fixed.load(past)
    found, expected = [], []
    for _ in range(2):
        found.append(fixed.step(torch.stack([probe.embeds[row, length] for row, length in enumerate(lengths)])))
        lengths = [length + 1 for length in lengths]
        expected.append(_at(probe, lengths))
    return torch.stack(found), torch.stack(expected)


def _left_padded(probe: Probe, lengths: Sequence[int], rows: Sequence[int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of so many first tokens of each row; other tokens, twice as large, stand in the padding."""
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=probe.ids.device)
    padded = [
        torch.cat([2 * probe.embeds[row, TOKENS - (width - length) :], probe.embeds[row, :length]])
        for row, length in zip(rows, lengths, strict=True)
    ]
    return torch.stack(padded), mask


def _at(probe: Probe, lengths: Sequence[int], rows: Sequence[int] = (0, 1)) -> Tensor:
    """The true states ``[B, d]`` after so many tokens of each row."""
    return torch.stack([probe.states[row, length - 1] for row, length in zip(rows, lengths, strict=True)])
