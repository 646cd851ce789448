"""The memory that a system in a folder will take, estimated before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recmas.agents.model_folder import check_model_folder
from recmas.config.parts import Trust, model_key, model_source, part
from recmas.config.system_json import SystemSpec, edge_name, read_spec, steps_by_role
from recmas.devices.placement import Devices, Placement, place
from recmas.errors import first_line
from recmas.sizing import BATCH_SIZE, SAFETY
from recmas.sizing.checkpoint_bytes import CheckpointBytes, checkpoint_bytes, summed
from recmas.sizing.free_memory import free_bytes
from recmas.sizing.kept_bytes import kept_bytes
from recmas.sizing.model_bytes import ModelBytes, model_bytes
from recmas.sizing.row_bytes import Length, added, longest, row_bytes, slot_positions

PROMPT_TOKENS = 512


@dataclass(frozen=True)
class AgentMemory:
    """One agent.

    Attributes:
        role, model, device: as placed; shares: the role whose model this one uses, if it does.
        parameters: of the model; weights: their bytes in `dtype`, the rows that fill packed ones up included.
        links: bytes of the links on the agent's device: its inner one, and those to it.
        cache_per_token: bytes of keys and values per position and row.
        row: bytes per row of a batch while the agent works, at the table's lengths.
        kept: bytes of what all prompts begin with, at most: templates without a field, of the table's length.
    """

    role: str
    model: str
    device: str
    shares: str | None
    parameters: int
    dtype: str
    weights: int
    links: int
    cache_per_token: int
    row: int
    kept: int


@dataclass(frozen=True)
class DeviceMemory:
    """One device, in bytes: weights and links that are there at once, a batch, what outlives one, their sum, and what
    is free now.
    """

    device: str
    weights: int
    links: int
    batch: int
    kept: int
    peak: int
    free: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the peak leaves `SAFETY`'s share of what is free; None where that is not known."""
        return None if self.free is None else self.peak <= SAFETY * self.free


@dataclass(frozen=True)
class MemoryTable:
    """A system's memory, for batches of so many rows whose templates take so many tokens."""

    agents: list[AgentMemory]
    devices: list[DeviceMemory]
    rounds: int
    prompt_tokens: int
    batch_size: int


def memory_table(
    folder: str | os.PathLike[str],
    *,
    device: Devices = "cpu",
    dtype: str = "auto",
    offload: bool = False,
    accelerate: bool = True,
    mode: str = "latent",
    rounds: int | None = None,
    latent_steps: int | Mapping[str, int] | None = None,
    max_new_tokens: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    batch_size: int = BATCH_SIZE,
    trust_remote_code: bool = False,
    allow_outside: bool = False,
    allow_hub: bool = False,
) -> MemoryTable:
    """What the system in `folder` will take; only configurations and headers of files are read.

    Models on the hub are looked up in its cache on this machine first, and only if they are not there on the hub.

    Args:
        folder: holds ``system.json``.
        device: as `RecursiveMAS.from_pretrained` takes it.
        dtype: of models and links; "auto" is what the system says, and float32 for links.
        offload: weights are in host memory, and on their device for their visits alone.
        accelerate: agents on a CPU are packed, as `RecursiveMAS.from_pretrained` does it.
        mode: "latent" or "text".
        rounds: None is the system's own; so for the next two.
        latent_steps: for all agents, or by role.
        max_new_tokens: per text.
        prompt_tokens: of each prompt, messages aside.
        batch_size: rows at once.
        trust_remote_code: for transformers.
        allow_outside, allow_hub: as `RecursiveMAS.from_pretrained` takes them.

    Raises:
        ValueError: a file that is missing or damaged, a model that the folder may not lead to, an unknown role, or a
            device that cannot be used; one line.
    """
    folder, trust = Path(folder), Trust(allow_outside, allow_hub)
    spec = read_spec(folder)
    for name, count, least in (("prompt_tokens", prompt_tokens, 1), ("batch_size", batch_size, 1)):
        if count < least:
            raise ValueError(f"{name}: {count} is less than {least}")
    placement = place(device, spec.pattern.roles)
    count = spec.defaults.rounds if rounds is None else rounds
    steps = steps_by_role(spec.agents, spec.defaults, latent_steps)
    lengths = _lengths(spec, mode, count, steps, max_new_tokens, prompt_tokens)
    links = _links(folder, spec, dtype, trust)
    agents: list[AgentMemory] = []
    shapes: dict[str, ModelBytes] = {}
    models: dict[tuple[str, str, torch.device], str] = {}
    for role, agent in spec.agents.items():
        source = model_source(folder, spec, role, trust)
        wanted = agent.dtype if dtype == "auto" else dtype
        shares = models.setdefault((model_key(source), wanted, placement[role]), role)
        if shares == role and Path(source).is_dir() and not trust.outside:
            check_model_folder(Path(source), folder, f"agent {role!r}", trust_remote_code)
        weights, shapes[role], known = _model(role, source, wanted, trust_remote_code)
        shape, length = shapes[role], lengths[role]
        templates = {agent.prompt.at(round) for round in range(1, min(count, 2) + 1)}
        prefixes = {} if offload else {role: [prompt_tokens] * len(templates)}
        packs = accelerate and not offload and placement[role].type == "cpu"
        agents.append(
            AgentMemory(
                role=role,
                model=agent.model,
                device=str(placement[role]),
                shares=None if shares == role else shares,
                parameters=weights.parameters,
                dtype=known,
                weights=weights.bytes_in(known, packs),
                links=links[role],
                cache_per_token=shape.cache_per_token,
                row=shape.cache(sum(length)) + shape.work(length.prompt),
                kept=kept_bytes(shapes, placement, prefixes)[placement[role]],
            )
        )
    rows = row_bytes(shapes, placement, lengths, count)
    devices = _devices(agents, placement, rows, batch_size, offload)
    return MemoryTable(agents, devices, count, prompt_tokens, batch_size)


def _lengths(
    spec: SystemSpec, mode: str, rounds: int, steps: Mapping[str, int], max_new_tokens: int | None, prompt_tokens: int
) -> dict[str, Length]:
    tokens = {
        role: agent.decoding.max_new_tokens if max_new_tokens is None else max_new_tokens
        for role, agent in spec.agents.items()
    }
    visits = spec.pattern.visits(rounds)
    return longest(
        {
            visit.role: Length(
                prompt_tokens + slot_positions(visit, spec.pattern, mode, steps, tokens),
                added(visit, mode, steps, tokens),
            )
        }
        for visit in visits
    )


def _links(folder: Path, spec: SystemSpec, dtype: str, trust: Trust) -> dict[str, int]:
    """Bytes of the links on each agent's device."""
    wanted = "float32" if dtype == "auto" else dtype
    links = dict.fromkeys(spec.agents, 0)
    for role, agent in spec.agents.items():
        if agent.inner_link is not None:
            inner = part(folder, spec, agent.inner_link, f"inner link of {role!r}", trust)
            links[role] += checkpoint_bytes(inner).bytes_in(wanted)
    for edge, path in spec.outer_links.items():
        outer = part(folder, spec, path, f"outer link {edge_name(edge)}", trust)
        links[edge[1]] += checkpoint_bytes(outer).bytes_in(wanted)
    return links


def _model(role: str, source: str, dtype: str, trust_remote_code: bool) -> tuple[CheckpointBytes, ModelBytes, str]:
    """CheckpointBytes, shape and dtype of a model that is not loaded."""
    from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
    from transformers import AutoConfig

    folder = Path(source)
    cached = None if folder.is_dir() else try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        folder = Path(cached).parent
    here = folder.is_dir() and any(folder.glob("*.safetensors"))
    try:
        config: Any = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else source, trust_remote_code=trust_remote_code
        )
        if here or Path(source).is_dir():
            weights = checkpoint_bytes(folder)
        else:
            counts: Any = get_safetensors_metadata(source).parameter_count
            weights = summed(counts)
        known = dtype
        if dtype == "auto":
            declared = config.dtype or config.get_text_config(decoder=True).dtype
            known = weights.dtype if declared is None else str(declared).removeprefix("torch.")
        return weights, model_bytes(config, torch.empty(0, dtype=getattr(torch, known)).element_size()), known
    except Exception as error:  # transformers and the hub each raise their own
        told = f"agent {role!r}: the memory of {source} cannot be estimated: {first_line(error)}"
        raise ValueError(told) from error


def _devices(
    agents: list[AgentMemory], placement: Placement, rows: Mapping[torch.device, int], batch_size: int, offload: bool
) -> list[DeviceMemory]:
    """A line per device; with `offload` the host holds all weights, a device the largest agent alone."""
    host = torch.device("cpu")
    devices = dict.fromkeys([*placement.values(), *([host] if offload else [])])
    lines = []
    for device in devices:
        here = [agent for agent in agents if agent.device == str(device)]
        if offload and device == host:
            here = agents
        weights = [0 if agent.shares else agent.weights for agent in here]
        links = [agent.links for agent in here]
        if offload and device != host:
            most = max(here, key=lambda agent: agent.weights + agent.links)
            weights, links = [most.weights], [most.links]
        batch, kept = batch_size * rows.get(device, 0), sum(agent.kept for agent in here)
        sums = sum(weights), sum(links), batch, kept
        lines.append(DeviceMemory(str(device), *sums, peak=sum(sums), free=free_bytes(device)))
    return lines


def render(table: MemoryTable) -> str:
    """The table as a page."""
    columns = [("agent", "model", "device", "parameters", "dtype", "weights", "links", "cache/token", "row", "kept")]
    for agent in table.agents:
        shared = agent.shares is not None
        columns.append(
            (
                agent.role,
                f"that of {agent.shares}" if shared else agent.model,
                agent.device,
                f"{agent.parameters:,}",
                agent.dtype,
                "shared" if shared else size(agent.weights),
                size(agent.links),
                size(agent.cache_per_token),
                size(agent.row),
                size(agent.kept),
            )
        )
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in columns]
    asked = f"{table.prompt_tokens} prompt tokens and the messages, {table.rounds} round(s)"
    lines.append(f"rows: {asked}, {table.batch_size} at once")
    for line in table.devices:
        verdict = {None: "", True: ": fits", False: ": does not fit"}[line.fits]
        free = "unknown" if line.free is None else size(line.free)
        lines.append(
            f"{line.device}: weights {size(line.weights)} + links {size(line.links)} + batch {size(line.batch)} "
            f"+ kept {size(line.kept)} = {size(line.peak)} at the peak, {free} free{verdict}"
        )
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
