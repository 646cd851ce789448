"""Released models as cases of a benchmark, from a folder that the caller names; nothing of them is kept here."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SWITCH = "RECMAS_BENCH_MODELS"
FOLDERS = ("qwen", "smollm2", "gemma")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model in a folder, its weights in one file."""

    folder: Path

    @cached_property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder)

    @property
    def name(self) -> str:
        """By its configuration, such as "qwen2-24x896-V151936": layers, features, vocabulary."""
        return f"{self.config.model_type}-{self.config.num_hidden_layers}x{self.features}-V{self.vocabulary}"

    @property
    def features(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def uses_gelu(self) -> bool:
        return "gelu" in (getattr(self.config, "hidden_act", None) or self.config.hidden_activation)

    @cached_property
    def sha256(self) -> str:
        """Of the weights' file."""
        digest = hashlib.sha256()
        with (self.folder / WEIGHTS).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def model(self) -> Any:
        """float32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)


def checkpoints() -> list[Checkpoint]:
    """Those of `FOLDERS` that the folder ``RECMAS_BENCH_MODELS`` holds; none where it is not set.

    Raises:
        ValueError: it is set, and holds none.
    """
    place = os.environ.get(SWITCH)
    if not place:
        return []
    found = [Checkpoint(Path(place, name)) for name in FOLDERS if Path(place, name, WEIGHTS).is_file()]
    if not found:
        raise ValueError(f"{SWITCH}={place} holds none of {', '.join(FOLDERS)} with a file {WEIGHTS}")
    return found
