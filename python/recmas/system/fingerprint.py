"""What decides a system's answers, as a digest: of every agent by itself, wherever it is, and of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from recmas.agents.fingerprint import described, tokenizer_digest
from recmas.config.pattern import Pattern
from recmas.config.system_json import Defaults, PlacementSpec
from recmas.system.member import Member
from recmas.system.system import System
from recmas_kernels import RecursiveLink, named_weights

SAMPLED = 1024  # about so many elements of each tensor of an agent stand for it


def digest(system: System) -> str:
    """Of what decides a system's answers: prompts, models, tokenizers, all links, samples of agents' weights.

    A prompt is also rendered, so that a chat template that writes the date makes another system of the same one. Where
    the parts lie, and where agents run, decides nothing: a run goes on from another folder, or with a copy.
    """
    members = {role: member_digest(system.member(role), system.pattern) for role in system.pattern.roles}
    return joint_digest(system.pattern, system.defaults, members)


def joint_digest(pattern: Pattern, defaults: Defaults, members: Mapping[str, str]) -> str:
    """Of a whole system, given the `member_digest` of every role."""
    return hashlib.sha256(repr((pattern, defaults, sorted(members.items()))).encode()).hexdigest()


def member_digest(member: Member, pattern: Pattern) -> str:
    """Of one agent with its links and prompts."""
    agent, prompts = member.agent, member.prompts
    setting = replace(prompts.setting, model="", inner_link=None, placement=PlacementSpec())
    found = hashlib.sha256(repr((member.role, agent.dtype, setting, described(agent))).encode())
    found.update(tokenizer_digest(agent.tokenizer).encode())
    for visit in pattern.visits(2):
        if visit.role == member.role:
            fields = prompts.template(visit.round).fields
            found.update(repr((visit, prompts.segments(visit.round, {name: name for name in fields}))).encode())
    tensors = {f"score {sender}": score for sender, score in (member.scores or {}).items()}
    for name, link in [("inner", member.inner_link), *((f"from {s}", link) for s, link in member.outer_links.items())]:
        if link is not None:
            tensors |= {f"{name}.{key}": value for key, value in link.state_dict().items()}
    for key, value in named_weights(agent.model):
        flat = value.detach().reshape(-1)
        tensors[f"agent.{key} {list(value.shape)}"] = flat[:: max(1, flat.numel() // SAMPLED)]
    _add(found, tensors)
    return found.hexdigest()


def link_digest(link: RecursiveLink | None) -> str:
    """Of a link's settings and weights; the empty text where there is none."""
    if link is None:
        return ""
    found = hashlib.sha256(repr(link.config).encode())
    _add(found, link.state_dict())
    return found.hexdigest()


def _add(found: hashlib._Hash, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
