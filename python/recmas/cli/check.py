"""``recmas check``: what a model proves of itself, with the numbers, and what is off for it."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from recmas.cli.common import dump
from recmas.cli.parser import CommandLineParser
from recmas.dtypes import DTYPES

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.engine.abilities import Proof


def add_options(parser: CommandLineParser) -> None:
    parser.add_argument("model", type=str, help="folder, GGUF file or hub id of a causal language model")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--device", type=str, default="cpu", help="where the proofs run: cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=list(DTYPES), help="of the model; auto: the checkpoint's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(options: Namespace) -> int:
    import transformers

    from recmas.agents.checking import proofs_of, refusal, switched_off
    from recmas.agents.loading import load_model
    from recmas.training.proofs import TRAINING

    transformers.utils.logging.disable_progress_bar()
    name = Path(options.model).name
    model, _ = load_model(options.model, options.dtype, options.device, options.trust_remote_code, name)
    proofs = proofs_of(model.requires_grad_(False).eval(), tuple(TRAINING))
    refused, without = refusal(proofs), switched_off(proofs)
    kind = model.config.model_type
    if options.json:
        dump({"type": kind, "refused": refused, "off": without, "proofs": {k: _as_json(p) for k, p in proofs.items()}})
    else:
        for feature, proof in proofs.items():
            print(f"{feature:18} {'holds' if proof.holds else 'FAILS':6} {proof}")
        for feature, text in without.items():
            print(f"without {feature}: {text}")
        print(f"a {kind} model {'is refused: ' + refused + ' fails' if refused else 'can be an agent'}")
    return 2 if refused else 0


def _as_json(proof: Proof) -> dict[str, object]:
    return {**asdict(proof), "error": proof.error if isfinite(proof.error) else None}
