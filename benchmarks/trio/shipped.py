"""Links that leave the machine they were trained on: stored in bfloat16, with a record of the models they belong to."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import WEIGHTS, Checkpoint
from benchmarks.trio.links import EDGE, save_links
from recmas import RecursiveMAS
from recmas.files import write_atomically

HUB = {
    "qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma": "google/gemma-3-270m",
}
"""Where the models come from, by the names of their folders."""
RECORD = "record.json"


def ship(system: RecursiveMAS, folder: Path, models: Mapping[str, str], entry: Mapping[str, Any]) -> None:
    """Write the system's links and their record.

    Args:
        system: the notes system; it is as it was afterwards.
        folder: to write.
        models: SHA-256 of the weights, by the names of the reader's and the solver's folder.
        entry: what is known of the links' training.
    """
    stored = copy.copy(system)
    stored.inner_links = {"reader": copy.deepcopy(system.inner_links["reader"]).to(torch.bfloat16)}
    stored.outer_links = {EDGE: copy.deepcopy(system.outer_links[EDGE]).to(torch.bfloat16)}
    save_links(stored, folder)
    named = zip(EDGE, models.items(), strict=True)
    agents = {role: {"folder": name, "hub": HUB.get(name), "sha256": digest} for role, (name, digest) in named}
    write_atomically(folder / RECORD, json.dumps({"models": agents, "links": dict(entry)}, indent=1) + "\n")


def models_of(models: Path, folder: Path, any_weights: bool = False) -> dict[str, str]:
    """By role, the name of the model folder in `models` that these links belong to.

    Raises:
        ValueError: no record, a model that is not there, or, unless `any_weights`, one of other weights.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{path}: no record there, so these are no shipped links")
    names = {}
    for role, model in json.loads(path.read_text(encoding="utf-8"))["models"].items():
        weights = models / model["folder"] / WEIGHTS
        if not weights.is_file():
            raise ValueError(f"{weights}: no model there; the {role} is {model['hub']}")
        if not any_weights and (found := Checkpoint(weights.parent).sha256) != model["sha256"]:
            raise ValueError(
                f"{weights}: its SHA-256 is {found}, these links were trained for {model['sha256']}; "
                "--any-weights runs them all the same"
            )
        names[role] = model["folder"]
    return names
