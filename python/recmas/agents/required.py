"""What a model must prove before it becomes an agent; without one of these no way of running it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recmas.agents.body import OwnLogits, Recorded
from recmas.engine.abilities import Proof, fingerprint, proof
from recmas.engine.probe import distance, probe_ids, slack
from recmas.engine.proofs import FEATURES

REQUIRED = {
    "embeddings": "states from token ids and states from their embeddings",
    "causality": FEATURES["causality"],
    "logits": "the model's own logits and those computed from its hidden states",
}
"""What each proof compares, in this order."""


@dataclass
class Required:
    """What was found.

    Attributes:
        proofs: by name, in the order of `REQUIRED`.
        path: of the part that `OwnLogits` replaces; empty where none serves.
        kind: what that part returns.
    """

    proofs: dict[str, Proof]
    path: str = ""
    kind: type = object

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
    ids = probe_ids(body)
    try:
        recorded = Recorded(model, body, ids)
        embeds = model.get_input_embeddings()(ids)
        states: Tensor = body(inputs_embeds=embeds).last_hidden_state
        if states.shape != embeds.shape:  # latents could not be fed back
            raise ValueError(f"hidden states of {states.shape[-1]} features for embeddings of {embeds.shape[-1]}")
        causality = proof(body, "causality")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that cannot be run from embeddings
        return Required({"embeddings": Proof.raised(error)})
    # The same operations on the same numbers: nothing but the states' own rounding may differ.
    bound = slack(body) * torch.finfo(states.dtype).eps / 2
    embeddings = Proof.of(distance(states, recorded.states), bound, REQUIRED["embeddings"])
    found = Required({"embeddings": embeddings, "causality": causality})
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


def _logits(model: PreTrainedModel, path: str, output: Any, recorded: Recorded, bound: float) -> Proof:
    try:
        logits = OwnLogits(model, path, type(output))(recorded.states)
    except Exception as error:  # whatever a forward raises that needs more than its body's states
        return Proof.raised(error)
    if logits.shape != recorded.logits.shape:
        return Proof.raised(ValueError(f"logits {tuple(logits.shape)}, expected {tuple(recorded.logits.shape)}"))
    return Proof.of(distance(logits, recorded.logits), bound, REQUIRED["logits"])
