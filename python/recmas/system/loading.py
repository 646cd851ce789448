"""A system on disk becomes a system, or one agent of it a `Member`; `recmas.system.folder` says what lies where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from recmas.agents.agent import Agent
from recmas.config.parts import Trust, model_key, model_source, part
from recmas.config.pattern import LinkKey
from recmas.config.system_json import SystemSpec, edge_name, read_spec
from recmas.devices.placement import Devices, Placement, place
from recmas.files.reading import check_regular
from recmas.system.folder import EDGE_SCORES
from recmas.system.member import Member, Prompts
from recmas.system.system import System
from recmas_kernels import FusedRecursiveLink

SystemClass = TypeVar("SystemClass", bound=System)


def load(
    cls: type[SystemClass],
    folder: Path,
    device: Devices,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    offload: bool,
    compile: bool,
    accelerate: bool,
    trust: Trust,
) -> SystemClass:
    """The system in `folder`. See `RecursiveMAS.from_pretrained`."""
    spec = read_spec(folder)
    sources = {role: model_source(folder, spec, role, trust) for role in spec.agents}
    visited = place(device, spec.pattern.roles)
    placement = place("cpu", spec.pattern.roles) if offload else visited
    inner_links, outer_links, edge_scores = _load_links(folder, spec, placement, dtype, trust)
    models = {role: (source, spec.agents[role].dtype if dtype is None else dtype) for role, source in sources.items()}
    root = None if trust.outside else folder
    packs = accelerate and not offload
    agents = load_agents(models, placement, trust_remote_code, compile, packs, root=root, offline=not trust.hub)
    try:
        return cls(
            agents,
            inner_links,
            outer_links,
            spec.pattern,
            settings=spec.agents,
            defaults=spec.defaults,
            edge_scores=edge_scores,
            offload=visited if offload else None,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def load_member(
    folder: Path,
    spec: SystemSpec,
    role: str,
    device: str,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    compile: bool,
    accelerate: bool,
    trust: Trust,
) -> Member:
    """One agent of the system in `folder`, of which `spec` was read there, with its links and prompts.

    Other arguments and errors are those of `RecursiveMAS.from_pretrained`.
    """
    source = model_source(folder, spec, role, trust)
    placement = place(device, [role])
    inner_links, outer_links, edge_scores = _load_links(folder, spec, placement, dtype, trust)
    agent = Agent.from_pretrained(
        source,
        spec.agents[role].dtype if dtype is None else dtype,
        placement[role],
        trust_remote_code,
        name=role,
        compile=compile,
        accelerate=accelerate,
        root=None if trust.outside else folder,
        offline=not trust.hub,
    )
    return Member(
        role,
        agent,
        Prompts(role, spec.agents[role], agent.tokenizer, agent.vocabulary),
        inner_links.get(role),
        outer_links,
        edge_scores or None,
    )


def _load_links(
    folder: Path, spec: SystemSpec, placement: Placement, dtype: torch.dtype | None, trust: Trust
) -> tuple[dict[str, FusedRecursiveLink], dict[LinkKey, FusedRecursiveLink], dict[LinkKey, nn.Parameter]]:
    """Inner links of the roles that are placed, the outer links to them, and the scores of these."""

    def link(name: str, path: str, role: str) -> FusedRecursiveLink:
        where = part(folder, spec, path, name, trust)
        return _load_link(where, name).to(placement[role], torch.float32 if dtype is None else dtype)

    inner_links = {
        role: link(f"inner link of {role!r}", agent.inner_link, role)
        for role, agent in spec.agents.items()
        if agent.inner_link is not None and role in placement
    }
    outer_links = {
        key: link(f"outer link {edge_name(key)}", path, key[1])
        for key, path in spec.outer_links.items()
        if key[1] in placement
    }
    edge_scores = {}
    if spec.pattern.combine == "weighted":
        scores = part(folder, spec, spec.edge_scores or EDGE_SCORES, "edge_scores", trust)
        edge_scores = _load_edge_scores(scores, outer_links, placement)
    return inner_links, outer_links, edge_scores


def load_agents(
    models: Mapping[str, tuple[str, str | torch.dtype]],
    placement: Placement,
    trust_remote_code: bool,
    compile: bool,
    accelerate: bool,
    *,
    root: Path | None = None,
    offline: bool = False,
) -> dict[str, Agent]:
    """An agent by role; roles that name the same model, dtype and device share one, whose name lists them all.

    Args:
        models: folder or hub id, and dtype, by role.
        placement: device by role.
        trust_remote_code: for transformers.
        compile: as for `Agent`.
        accelerate: as for `Agent`.
        root, offline: as for `Agent.from_pretrained`.
    """
    shared: dict[tuple[str, str | torch.dtype, torch.device], Agent] = {}
    agents = {}
    for role, (source, dtype) in models.items():
        key = (model_key(source), dtype, placement[role])
        if key in shared:
            shared[key].name += f", {role}"
        else:
            shared[key] = Agent.from_pretrained(
                source,
                dtype,
                placement[role],
                trust_remote_code,
                name=role,
                compile=compile,
                accelerate=accelerate,
                root=root,
                offline=offline,
            )
        agents[role] = shared[key]
    return agents


def _load_link(place: Path, name: str) -> FusedRecursiveLink:
    if not place.is_dir():
        raise ValueError(f"{name}: no such folder: {place}")
    try:
        return FusedRecursiveLink.from_pretrained(place)
    except (ValueError, OSError) as error:
        where = "" if str(place) in str(error) else f"{place}: "
        raise ValueError(f"{name}: {where}{error}") from None


def _load_edge_scores(
    path: Path, links: Mapping[LinkKey, nn.Module], placement: Placement
) -> dict[LinkKey, nn.Parameter]:
    try:
        check_regular(path)
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if missing := sorted(edge_name(key) for key in links if edge_name(key) not in stored):
        raise ValueError(f"{path}: no score for {', '.join(missing)}")
    if wrong := sorted(edge_name(key) for key in links if stored[edge_name(key)].shape != ()):
        raise ValueError(f"{path}: {wrong[0]} is no scalar")
    return {key: nn.Parameter(stored[edge_name(key)].to(placement[key[1]])) for key in links}
