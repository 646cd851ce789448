"""Digests of what decides an agent's token ids and hidden states."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from recmas.agents.model import FrozenModel
from recmas_kernels import named_weights

_UNRELATED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def described(agent: FrozenModel) -> str:
    """The model's configuration, but for where it came from."""
    config = {key: value for key, value in agent.model.config.to_dict().items() if key not in _UNRELATED}
    return json.dumps(config, sort_keys=True, default=repr)


def model_digest(agent: FrozenModel) -> str:
    """sha256 of the model's configuration, and of every parameter and buffer in full."""
    digest = hashlib.sha256(described(agent).encode())
    for name, value in named_weights(agent.model):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of how texts become ids: the whole pipeline of a fast tokenizer, a slow one's vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = sorted(tokenizer.get_vocab().items()) if fast is None else fast.to_str()
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(repr((type(tokenizer).__name__, pipeline, special)).encode()).hexdigest()
