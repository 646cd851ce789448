"""A model's folder that nobody vouches for: looked through before anything is loaded from it.

What is promised: nothing outside of the folder that holds it is read, no pickle is, and no more weights are allocated
than its files hold. Its tokenizer's own patterns are not looked at.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from recmas.agents.classes import described
from recmas.errors import first_line
from recmas.files.reading import OUTSIDE, check_regular, inside, read_json
from recmas.files.safetensors_header import stored_tensors

_MOST_FILES = 10_000
_LAYERS = re.compile(r"(num_|n_)?(hidden_)?layers?|num_\w+_layers|depth")
_PACKED = 16
"""Weights that one stored element may stand for, in a quantised checkpoint: 2 bits each in an int32."""


def check_model_folder(folder: Path, root: Path, key: str, trust_remote_code: bool = False) -> None:
    """Look through `folder` before transformers does.

    Args:
        folder: of a model.
        root: folder of the system; symbolic links may lead around in it, but not out of it.
        key: begins messages.
        trust_remote_code: the model's own code is allowed to run, so its size is its own business.

    Raises:
        ValueError: something that is no regular file, a link or an index that leads out of `root`, no safetensors
            files, or a configuration that describes a model of more weights than they hold.
    """
    _check_files(folder, root, key)
    config = read_json(folder / "config.json", strict=False)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: holds a {type(config).__name__}, expected an object")
    tensors = list(stored_tensors(folder))
    layers = max((count for name, count in _numbers(config) if _LAYERS.fullmatch(name)), default=0)
    if layers > max(len(tensors), 1):
        raise ValueError(f"{folder / 'config.json'}: {layers} layers, but the weights are {len(tensors)} tensors")
    if not trust_remote_code:
        elements = sum(tensor.elements for tensor in tensors)
        most = elements * (_PACKED if "quantization_config" in config else 1)
        if (needed := _parameters(folder, key)) > most:
            raise ValueError(f"{folder / 'config.json'}: describes {needed:,} weights, the files hold {elements:,}")


def _check_files(folder: Path, root: Path, key: str) -> None:
    relative = os.path.relpath(folder, root)
    found = 0
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path, found = Path(place, name), found + 1
            if found > _MOST_FILES:
                raise ValueError(f"{key}: {folder} holds more than {_MOST_FILES} files")
            try:
                inside(root, os.path.normpath(Path(relative, path.relative_to(folder))), key)
            except ValueError as error:
                raise ValueError(f"{error}; {OUTSIDE}") from None
            if name in files:
                check_regular(path)


def _numbers(config: dict[str, Any]) -> list[tuple[str, int]]:
    """Integers of a configuration and of those inside it, by key."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _numbers(value)
        elif isinstance(value, int):
            found.append((name, value))
    return found


def _parameters(folder: Path, key: str) -> int:
    """Weights of the model that the configuration describes, built without memory for any."""
    from transformers import AutoConfig

    try:
        # A False is what keeps transformers from asking on the terminal whether to run the model's own code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = described(config)
    except Exception as error:  # transformers raises many kinds, and torch for sizes beyond 64 bits
        if "trust_remote_code" in str(error):
            return 0  # the loader refuses it, and says why
        raise ValueError(f"{key}: cannot load {folder}: {first_line(error)}") from error
    return sum(weight.numel() for weight in model.parameters())
