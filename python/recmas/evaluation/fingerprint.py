"""What distinguishes one run's answers from another's: the system, the settings, the rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import torch

from recmas.agents.fingerprint import described, tokenizer_digest
from recmas.config.system_json import edge_name
from recmas.system.system import System
from recmas_kernels import named_weights

SAMPLED = 1024  # about so many elements of each tensor of an agent stand for it


def key_of(*described: Any) -> str:
    """16 hexadecimal digits for anything that can be written down."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(system: System) -> str:
    """Of what decides a system's answers: prompts, models, tokenizers, all links, samples of agents' weights.

    A prompt is also rendered, so that a chat template that writes the date makes another system of the same one. Where
    the parts lie decides nothing: a run goes on from another folder, or with a copy.
    """
    found = hashlib.sha256(repr(system.pattern).encode())
    for role, agent in system.agents.items():
        setting = replace(system.settings[role], model="", inner_link=None)
        found.update(repr((role, agent.dtype, setting, system.defaults, described(agent))).encode())
        found.update(tokenizer_digest(agent.tokenizer).encode())
    for visit in system.pattern.visits(2):
        fields = system.template(visit.role, visit.round).fields
        found.update(repr((visit, system.segments(visit, {name: name for name in fields}))).encode())
    tensors: dict[str, torch.Tensor] = {edge_name(edge): score for edge, score in system.edge_scores.items()}
    links = {**system.inner_links, **{edge_name(edge): link for edge, link in system.outer_links.items()}}
    for name, link in links.items():
        tensors.update({f"{name}.{key}": value for key, value in link.state_dict().items()})
    for role, agent in system.agents.items():
        for key, value in named_weights(agent.model):
            flat = value.detach().reshape(-1)
            tensors[f"agent {role}.{key} {list(value.shape)}"] = flat[:: max(1, flat.numel() // SAMPLED)]
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
