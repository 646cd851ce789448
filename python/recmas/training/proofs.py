"""What a decoder is asked to prove before training goes on from begun prefixes and runs layers again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.engine.abilities import Proof, missing, proves
from recmas.engine.continuation import positions_of
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.messages import Prompt
from recmas.engine.prefill import missing_padding
from recmas.engine.probe import COMMON, Probe, distance, moved, noise, slack
from recmas.training.unroll import cropped, fork, recomputing, unforkable

TRAINING = {
    "begun prefixes": "states and gradients after a beginning read without gradients and those of one forward",
    "recompute": "states and gradients of layers run again in the backward and those of layers run once",
}
"""What each proof compares."""


def proved(decoder: PreTrainedModel, feature: str, prompt: Prompt | None = None) -> bool:
    """Whether a decoder may be trained through so, and on `prompt` as the one batch that this takes."""
    return not missing(decoder, feature) and (prompt is None or not missing_padding(decoder, prompt.mask))


@proves("begun prefixes", "recompute")
def _unrolling(decoder: PreTrainedModel) -> dict[str, Proof]:
    """Recompute is proved on the plain forward and on a begun one; where only the latter fails, that is off."""
    probe = Probe(decoder)
    step = _Step(probe)
    plain = step.plain()
    found = {
        "begun prefixes": step.proof("begun prefixes", plain, step.begun),
        "recompute": step.proof("recompute", plain, partial(step.plain, again=True)),
    }
    if all(proof.holds for proof in found.values()):
        both = step.proof("begun prefixes", plain, partial(step.begun, again=True))
        if not both.holds:
            found["begun prefixes"] = both
    return found


class _Step:
    """States of the probe's rows, and the gradient that arrives at the embeddings of their last tokens."""

    def __init__(self, probe: Probe) -> None:
        self.decoder, self.call = probe.decoder, DecoderCall(probe.decoder)
        self.embeds = torch.cat([probe.embeds, moved(probe.embeds[:1])])
        self.tokens_of = torch.cat([probe.embeds, probe.embeds[:1]])
        self.mask = torch.ones(self.embeds.shape[:2], dtype=torch.int64, device=self.embeds.device)
        self.positions = positions_of(self.mask)
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(self.embeds.shape, generator=generator).to(self.embeds)[:1]

    def plain(self, again: bool = False) -> Tensor:
        def states(embeds: Tensor) -> Tensor:
            return self.call(embeds, self.mask, self.positions, tokens_of=self.tokens_of)[:, COMMON:]

        return self._with_gradient(states, again)

    def begun(self, again: bool = False) -> Tensor:
        cache = DynamicCache(config=self.decoder.config)
        if reason := unforkable(cache):
            raise ValueError(reason)
        with torch.no_grad():
            self.call(self.embeds[:, :COMMON], self.mask[:, :COMMON], self.positions[:, :COMMON], cache)

        known = COMMON if cropped(cache, COMMON - 1) is None else COMMON - 1

        def rest(embeds: Tensor) -> Tensor:
            begun = fork(cache) if known == COMMON else cropped(cache, known)
            return self.call(embeds[:, known:], self.mask, self.positions[:, known:], begun)[:, COMMON - known :]

        return self._with_gradient(rest, again)

    def proof(self, feature: str, plain: Tensor, compute: Callable[[], Tensor]) -> Proof:
        bound = slack(self.decoder) * noise(plain[:, 2], plain[:, 0])
        try:
            found = compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever layers raise that cannot be run so
            return Proof.raised(error)
        return Proof.of(distance(found[:, :2], plain[:, :2]), bound, TRAINING[feature])

    def _with_gradient(self, states_of: Callable[[Tensor], Tensor], again: bool) -> Tensor:
        """``[2, B, 4, d]``: states and gradients of the last tokens; the backward comes later, as in training."""
        embeds = self.embeds.detach().requires_grad_()
        with torch.enable_grad(), recomputing(self.decoder, enabled=again):
            loss = (states := states_of(embeds)).mul(self.weight[:, COMMON:]).sum()
        (gradient,) = torch.autograd.grad(loss, embeds)
        return torch.stack([states.detach(), gradient[:, COMMON:]])
