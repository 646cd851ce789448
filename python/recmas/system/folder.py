"""A system on disk: ``system.json``, ``links/<name>/`` and, for models that are not on the hub, ``agents/<role>/``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from recmas.agents.agent import Agent
from recmas.config.model_source import model_key, model_source
from recmas.config.pattern import Edge
from recmas.config.system_json import FILE_NAME, SystemSpec, edge_name, read_spec, write_spec
from recmas.devices.placement import Devices, Placement, place
from recmas.files import sync
from recmas.system.system import System
from recmas_kernels import FusedRecursiveLink

SystemClass = TypeVar("SystemClass", bound=System)

EDGE_SCORES = "links/edge_scores.safetensors"


def describe(system: System) -> SystemSpec:
    """What ``system.json`` says of `system`, with the paths that `save` gives to its parts."""
    homes: dict[tuple[int, int], str] = {}
    agents = {}
    for role, agent in system.agents.items():
        home = homes.setdefault((id(agent.model), id(agent.tokenizer)), f"agents/{role}")
        model = home if agent.source is None or _is_local(agent) else agent.source
        inner_link = f"links/{role}" if role in system.inner_links else None
        agents[role] = replace(system.settings[role], model=model, inner_link=inner_link)
    outer_links = {edge: f"links/{edge[0]}-{edge[1]}" for edge in system.outer_links}
    return SystemSpec(system.pattern, agents, outer_links, system.defaults)


def save(system: System, folder: Path) -> None:
    """Write everything beside `folder`, sync it, then move it into place; what it replaces is deleted after that."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE_NAME).exists():
        raise ValueError(f"{folder}: exists and is not a system; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    spec = describe(system)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh, replaced = beside / "fresh", beside / "replaced"
    try:
        _write(system, spec, fresh, folder)
        for path in [fresh, *fresh.rglob("*")]:
            sync(path)
        _put_in_place(fresh, folder, replaced)
    finally:
        unfinished = (fresh / FILE_NAME).exists()
        if not (unfinished and any(replaced.glob("*/*"))):  # else not even putting back went well: it stays
            shutil.rmtree(beside)


def _put_in_place(fresh: Path, folder: Path, replaced: Path) -> None:
    """Move every part of `fresh` into `folder`, ``system.json`` last, and what they replace into `replaced`.

    On an exception before ``system.json`` is in place, everything goes back to where it was.
    """
    parents = [folder, folder / "agents", folder / "links"]
    made = [parent for parent in parents if not parent.exists()]
    moves: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        moves.append((source, target))  # before it is done, that no interrupt can come between
        os.replace(source, target)

    try:
        folder.mkdir(exist_ok=True)
        for part in sorted(part for kind in ("agents", "links") for part in fresh.glob(f"{kind}/*")):
            place = folder / part.relative_to(fresh)
            if os.path.lexists(place):
                move(place, replaced / part.relative_to(fresh))
            move(part, place)
        for parent in parents:
            if parent.exists():
                sync(parent)
        os.replace(fresh / FILE_NAME, folder / FILE_NAME)
        sync(folder)
        sync(folder.parent)
    except BaseException:
        if (fresh / FILE_NAME).exists():
            for source, target in reversed(moves):
                if os.path.lexists(target) and not os.path.lexists(source):
                    os.replace(target, source)
            for parent in reversed(made):
                if parent.exists():
                    parent.rmdir()
        raise


def _write(system: System, spec: SystemSpec, fresh: Path, folder: Path) -> None:
    written: set[str] = set()
    for role, agent in system.agents.items():
        home = spec.agents[role].model
        in_place = agent.source is not None and Path(agent.source).resolve() == (folder / home).resolve()
        if _is_local(agent) and home not in written and not in_place:
            agent.save_pretrained(fresh / home)
            written.add(home)
    for role, link in system.inner_links.items():
        link.save_pretrained(fresh / str(spec.agents[role].inner_link))
    for edge, link in system.outer_links.items():
        link.save_pretrained(fresh / spec.outer_links[edge])
    if system.edge_scores:
        (fresh / "links").mkdir(parents=True, exist_ok=True)
        scores = {edge_name(edge): score.detach().cpu() for edge, score in system.edge_scores.items()}
        save_file(scores, fresh / EDGE_SCORES)
    fresh.mkdir(parents=True, exist_ok=True)
    write_spec(fresh, spec)


def load(
    cls: type[SystemClass],
    folder: Path,
    device: Devices,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    offload: bool,
    compile: bool,
) -> SystemClass:
    """The system in `folder`. See `RecursiveMAS.from_pretrained`."""
    spec = read_spec(folder)
    visited = place(device, spec.pattern.roles)
    placement = place("cpu", spec.pattern.roles) if offload else visited
    link_dtype = torch.float32 if dtype is None else dtype
    inner_links = {
        role: _load_link(folder, agent.inner_link, f"inner link of {role!r}").to(placement[role], link_dtype)
        for role, agent in spec.agents.items()
        if agent.inner_link is not None
    }
    outer_links = {
        edge: _load_link(folder, path, f"outer link {edge_name(edge)}").to(placement[edge[1]], link_dtype)
        for edge, path in spec.outer_links.items()
    }
    edge_scores = _load_edge_scores(folder, outer_links, placement) if spec.pattern.combine == "weighted" else {}
    models = {
        role: (model_source(folder, role, agent.model), agent.dtype if dtype is None else dtype)
        for role, agent in spec.agents.items()
    }
    agents = load_agents(models, placement, trust_remote_code, compile)
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


def load_agents(
    models: Mapping[str, tuple[str, str | torch.dtype]], placement: Placement, trust_remote_code: bool, compile: bool
) -> dict[str, Agent]:
    """An agent by role; roles that name the same model, dtype and device share one, whose name lists them all.

    Args:
        models: folder or hub id, and dtype, by role.
        placement: device by role.
        trust_remote_code: for transformers.
        compile: as for `Agent`.
    """
    shared: dict[tuple[str, str | torch.dtype, torch.device], Agent] = {}
    agents = {}
    for role, (source, dtype) in models.items():
        key = (model_key(source), dtype, placement[role])
        if key in shared:
            shared[key].name += f", {role}"
        else:
            shared[key] = Agent.from_pretrained(
                source, dtype, placement[role], trust_remote_code, name=role, compile=compile
            )
        agents[role] = shared[key]
    return agents


def _load_link(folder: Path, path: str, name: str) -> FusedRecursiveLink:
    place = folder / path
    if not place.is_dir():
        raise ValueError(f"{name}: no such folder: {place}")
    try:
        return FusedRecursiveLink.from_pretrained(place)
    except (ValueError, OSError) as error:
        where = "" if str(place) in str(error) else f"{place}: "
        raise ValueError(f"{name}: {where}{error}") from None


def _load_edge_scores(folder: Path, edges: Mapping[Edge, nn.Module], placement: Placement) -> dict[Edge, nn.Parameter]:
    path = folder / EDGE_SCORES
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if missing := sorted(edge_name(edge) for edge in edges if edge_name(edge) not in stored):
        raise ValueError(f"{path}: no score for {', '.join(missing)}")
    return {edge: nn.Parameter(stored[edge_name(edge)].to(placement[edge[1]])) for edge in edges}


def _is_local(agent: Agent) -> bool:
    return agent.source is None or Path(agent.source).is_dir()
