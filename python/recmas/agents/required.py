"""What a model must prove before it becomes an agent; without one of these no way of running it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recmas.agents.body import OwnLogits, Recorded
from recmas.engine.abilities import Proof, fingerprint, proof
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.probe import distance, moved, noise, probe_ids
from recmas.engine.proofs import FEATURES

REQUIRED = {
    "embeddings": "states from token ids and states from their embeddings",
    "causality": FEATURES["causality"],
    "logits": "the model's own logits and those computed from its hidden states",
}
"""What each proof compares, in this order."""
FEW = 2
"""Tokens that run through all of a model; the rest is proved on its first layers."""


@dataclass
class Required:
    """What was found.

    Attributes:
        proofs: by name, in the order of `REQUIRED`.
        path: of the part that `OwnLogits` replaces; empty where none serves.
        kind: what that part returns.
        embed_scale: factor that the body puts on the embeddings it looks up, and not on those that it is given.
    """

    proofs: dict[str, Proof]
    path: str = ""
    kind: type = object
    embed_scale: float = 1.0

    @property
    def refusal(self) -> str:
        """Which proof failed, and how; empty if none did."""
        failed = (f"{name}: {found}" for name, found in self.proofs.items() if not found.holds)
        return next(failed, "")


_FOUND: dict[str, Required] = {}


def required(model: PreTrainedModel, body: PreTrainedModel) -> Required:
    """The proofs of a model; they run once for all models of one fingerprint, on all of the model, in its own dtype."""
    key = f"{type(model).__qualname__} {fingerprint(body)}"
    if key not in _FOUND:
        _FOUND[key] = _prove(model, body)
    return _FOUND[key]


@torch.no_grad()
def _prove(model: PreTrainedModel, body: PreTrainedModel) -> Required:
    ids = probe_ids(body)[:1, :FEW]
    try:
        recorded = Recorded(model, body, ids)
        embeds = model.get_input_embeddings()(ids)
        if recorded.states.shape != embeds.shape:  # latents could not be fed back
            shapes = recorded.states.shape[-1], embeds.shape[-1]
            raise ValueError("hidden states of {} features for embeddings of {}".format(*shapes))
        embeddings, scale = _embeddings(body, embeds, recorded.states)
        causality = proof(body, "causality")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that cannot be run from embeddings
        return Required({"embeddings": Proof.raised(error)})
    found = Required({"embeddings": embeddings, "causality": causality}, embed_scale=scale)
    found.proofs["logits"] = Proof(
        False, float("inf"), 0.0, f"{type(model).__name__} has no LM head on its body's states"
    )
    for path, output in recorded.outputs.items():
        logits = _logits(model, path, output, recorded)
        if logits.holds or not found.path:
            found.proofs["logits"] = logits
        if logits.holds:
            found.path, found.kind = path, type(output)
            break
    return found


def _embeddings(body: PreTrainedModel, embeds: Tensor, expected: Tensor) -> tuple[Proof, float]:
    """The proof of states from embeddings ``[1, T, d]``, and the factor that they need for it.

    A body may multiply what it looks up, and not what it is given; the number is one that it keeps. Where the product
    is not rounded as ours is, the states differ by what a unit in the last place of the embeddings changes.
    """
    call, bound = DecoderCall.plain(body), _rounding(expected)
    error, scale = distance(call(embeds), expected), 1.0
    if error > bound:
        numbers = (value for value in vars(body).values() if isinstance(value, int | float) and value)
        errors = {float(factor): distance(call(factor * embeds), expected) for factor in (1.0, *numbers)}
        scale = min(errors, key=errors.__getitem__)
        if scale != 1.0:
            error, bound = errors[scale], max(bound, 2 * noise(call(moved(scale * embeds)), expected))
    return Proof.of(error, bound, REQUIRED["embeddings"]), scale


def _rounding(expected: Tensor) -> float:
    """The difference of the same operations on the same numbers, whose sums may be rounded in another order."""
    return 4 * float(torch.finfo(expected.dtype).eps)


def _logits(model: PreTrainedModel, path: str, output: Any, recorded: Recorded) -> Proof:
    try:
        logits = OwnLogits(model, path, type(output))(recorded.states)
    except Exception as error:  # whatever a forward raises that needs more than its body's states
        return Proof.raised(error)
    if logits.shape != recorded.logits.shape:
        return Proof.raised(ValueError(f"logits {tuple(logits.shape)}, expected {tuple(recorded.logits.shape)}"))
    return Proof.of(distance(logits, recorded.logits), _rounding(logits), REQUIRED["logits"])
