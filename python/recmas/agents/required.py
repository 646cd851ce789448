"""What a model must prove before it becomes an agent; without one of these no way of running it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from recmas.agents.body import OwnLogits, Recorded
from recmas.engine.abilities import Proof, fingerprint, proof
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.probe import distance, probe_ids, slack
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
        states = DecoderCall.plain(body)(embeds)
        if states.shape != embeds.shape:  # latents could not be fed back
            raise ValueError(f"hidden states of {states.shape[-1]} features for embeddings of {embeds.shape[-1]}")
        causality = proof(body, "causality")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that cannot be run from embeddings
        return Required({"embeddings": Proof.raised(error)})
    # The same operations on the same numbers: nothing but the states' own rounding may differ.
    bound = slack(body) * torch.finfo(states.dtype).eps / 2
    found = Required({"embeddings": Proof.of(distance(states, recorded.states), bound, REQUIRED["embeddings"])})
    for scale in () if found.proofs["embeddings"].holds else _factors(body):
        states = DecoderCall.plain(body)(scale * embeds)
        scaled = Proof.of(distance(states, recorded.states), bound, REQUIRED["embeddings"])
        if scaled.holds:
            found.proofs["embeddings"], found.embed_scale = scaled, scale
            break
    found.proofs["causality"] = causality
    found.proofs["logits"] = Proof(
        False, float("inf"), 0.0, f"{type(model).__name__} has no LM head on its body's states"
    )
    for path, output in recorded.outputs.items():
        logits = _logits(model, path, output, recorded, bound)
        if logits.holds or not found.path:
            found.proofs["logits"] = logits
        if logits.holds:
            found.path, found.kind = path, type(output)
            break
    return found


def _factors(body: PreTrainedModel) -> list[float]:
    """Numbers that a body keeps beside its parts; the one that it puts on its embeddings is among them."""
    numbers = (value for value in vars(body).values() if isinstance(value, int | float))
    return [float(number) for number in dict.fromkeys(numbers) if number not in (0, 1)]


def _logits(model: PreTrainedModel, path: str, output: Any, recorded: Recorded, bound: float) -> Proof:
    try:
        logits = OwnLogits(model, path, type(output))(recorded.states)
    except Exception as error:  # whatever a forward raises that needs more than its body's states
        return Proof.raised(error)
    if logits.shape != recorded.logits.shape:
        return Proof.raised(ValueError(f"logits {tuple(logits.shape)}, expected {tuple(recorded.logits.shape)}"))
    return Proof.of(distance(logits, recorded.logits), bound, REQUIRED["logits"])
