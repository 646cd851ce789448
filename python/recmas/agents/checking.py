"""All that a model proves, and what is off for it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from recmas.agents.body import body_of
from recmas.agents.loading import load_model
from recmas.agents.required import REQUIRED, required
from recmas.engine.abilities import Proof, proof
from recmas.engine.proofs import FEATURES

WITHOUT = {
    "cache": "every step reads the whole sequence again",
    "several positions": "results of tools are read position by position, and no prefix is reused",
    "padding": "rows of other lengths run apart",
    "prefix reuse": "every prompt is read from its beginning",
    "fixed shapes": "no CUDA graphs, and --compile changes nothing",
    "cached gradients": "rollouts in training read the whole sequence again at every step",
    "begun prefixes": "outer training reads every prompt with gradients",
    "recompute": "outer training keeps all activations",
}
"""What is done without a feature. The other proofs decide only how a model is called."""


SMALL = 1 << 28
"""Bytes of a checkpoint that is loaded only to say what is off for it."""


def proofs_of(model: PreTrainedModel, others: tuple[str, ...] = ()) -> dict[str, Proof]:
    """All proofs of a model by name; only the required ones where one of them fails.

    Args:
        model: a causal language model.
        others: further features, whose provers are registered.
    """
    body = body_of(model)
    needed = required(model, body)
    if needed.refusal:
        return dict(needed.proofs)
    names = [name for name in (*FEATURES, *others) if name not in REQUIRED]
    return needed.proofs | {name: proof(body, name) for name in names}


def refusal(proofs: dict[str, Proof]) -> str:
    """Which required proof failed; empty if none did."""
    return next((name for name in REQUIRED if name in proofs and not proofs[name].holds), "")


def switched_off(proofs: dict[str, Proof]) -> dict[str, str]:
    """What is done without each feature that a model has not proved, by its name."""
    return {name: text for name, text in WITHOUT.items() if name in proofs and not proofs[name].holds}


def off_of_checkpoint(
    source: str, dtype: str, name: str, others: tuple[str, ...] = (), *, trust_remote_code: bool, root: Path | None
) -> str:
    """What is off for a model on disk, in a line: proved now where it is small, else how to have it proved.

    Args:
        source: folder or hub id.
        dtype, name: as `load_model` takes them.
        others: as for `proofs_of`.
        trust_remote_code, root: as for `load_model`.
    """
    folder = Path(source)
    if not folder.is_dir() or sum(file.stat().st_size for file in folder.glob("*.safetensors")) > SMALL:
        return f"recmas check {source} proves what it can do"
    model, _ = load_model(source, dtype, "cpu", trust_remote_code, name, root, offline=True)
    proofs = proofs_of(model.requires_grad_(False).eval(), others)
    if refused := refusal(proofs):
        return f"refused: {refused}: {proofs[refused]}"
    return "; ".join(f"without {feature}: {text}" for feature, text in switched_off(proofs).items()) or "nothing is off"
