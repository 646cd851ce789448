"""From the reference implementation's ``.pt`` links to safetensors, and from our links and systems back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recmas.config.parts import Trust, model_source, part
from recmas.config.pattern import Edge, LinkKey
from recmas.config.system_json import FILE_NAME, SystemSpec, edge_name, read_spec
from recmas.files import replacing, replacing_folder, write_atomically
from recmas.upstream.convert import Folder, new_folder, read_link
from recmas.upstream.styles import FAMILIES, OUTER, Family
from recmas.upstream.weights import (
    INNER_CONFIG,
    INNER_MANIFEST,
    INNER_WEIGHTS,
    OUTER_CONFIG,
    OUTER_MANIFEST,
    named_type,
)
from recmas_kernels import FusedRecursiveLink, LinkConfig

_LINK_CONFIG = "config.json"


def link_to_safetensors(source: Folder, folder: Folder, *, adapter_type: str | None = None) -> LinkConfig:
    """Write a ``.pt`` link, or a role folder's ``adapter.pt``, as a link folder of ours; every bit is kept.

    Args:
        source: state dict file, or folder with ``adapter.pt`` and ``adapter_config.json``.
        folder: link folder to make.
        adapter_type: its type; None reads ``adapter_config.json`` beside the file, else what the parameters imply.

    Returns:
        The link's shape.

    Raises:
        ValueError: a file that is missing, damaged, of unknown or ambiguous type, or a folder that exists already.
    """
    place, path = new_folder(folder), Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"source: no such file or folder: {path}")
    if path.is_dir():
        path = path / INNER_WEIGHTS
    if adapter_type is None and path.name.startswith("adapter"):
        adapter_type = named_type(path.parent)
    link = read_link(path, adapter_type, "source")
    with replacing_folder(place) as fresh:
        link.save_pretrained(fresh)
    return link.config


def to_pt(source: Folder, out: Folder, *, allow_outside: bool = False) -> list[Path]:
    """Write a link or a system of ours in the files that the reference implementation loads.

    A link folder becomes one state dict ``out``, which must end in ``.pt``. A system becomes a folder ``out`` with a
    folder per role (``adapter.pt``, ``adapter_config.json`` and, where the model is local, symbolic links to its files)
    and ``outer/`` with its links, ``outerlink_config.json`` and ``outer_adapter_config.json``.

    Args:
        source: folder of a link or of a system.
        out: file or folder to make.
        allow_outside: models and links may be in other folders than the system's.

    Returns:
        What was written: the state dicts.

    Raises:
        ValueError: neither link nor system, a link or a pattern that the reference implementation does not have, or an
            `out` that exists already.
    """
    folder, place = Path(source).expanduser(), new_folder(out)
    if (folder / FILE_NAME).is_file():
        return _system_to_pt(folder, place, Trust(allow_outside, hub=True))  # of the hub nothing is asked
    if not (folder / _LINK_CONFIG).is_file():
        raise ValueError(f"source: {folder} is neither a system (no {FILE_NAME}) nor a link (no {_LINK_CONFIG})")
    if place.suffix != ".pt" or place.is_dir():
        raise ValueError(f"out: {out} is not the name of a .pt file, which a single link becomes")
    link = _own_link(folder)
    adapter_type(link.config, str(folder))
    place.parent.mkdir(parents=True, exist_ok=True)
    _save(link, place)
    return [place]


def adapter_type(config: LinkConfig, where: str) -> str:
    """The reference implementation's name for a link of this shape; ValueError where it has none."""
    outer = config.kind == "outer"
    hidden = config.hidden_features
    if config.layers == 2:
        hidden = config.in_features if not outer else config.out_features * (2 if config.norm else 1)
    lacks = [
        ("no biases", not config.bias),
        (f"residual {config.residual!r}", config.residual not in ("linear" if outer else "identity", "none")),
        ("norms without a residual", config.norm and not outer and config.residual == "none"),
        ("norms around one layer", config.norm and config.layers == 1),
        (f"{config.hidden_features} hidden features (it has {hidden})", config.hidden_features != hidden),
        (f"activation {config.activation!r}", config.activation != "gelu" and config.layers == 2),
        (f"eps {config.eps}", config.eps != 1e-5 and config.norm),
    ]
    for lack, true in lacks:
        if true:
            raise ValueError(f"{where}: the reference implementation has no link with {lack}")
    parts = ["outer"] if outer else []
    parts += ["linear"] if config.layers == 1 else ["ln"] if config.norm else []
    parts += ["res"] if config.residual != "none" else []
    return "_".join([*parts, "adapter"])


def _system_to_pt(folder: Path, place: Path, trust: Trust) -> list[Path]:
    spec = read_spec(folder)
    family = _family(folder, spec)
    inner = {
        role: _own_link(part(folder, spec, agent.inner_link, f"inner link of {role!r}", trust))
        for role, agent in spec.agents.items()
        if agent.inner_link
    }
    outer = {
        _edge(key, folder): _own_link(part(folder, spec, path, f"outer link {edge_name(key)}", trust))
        for key, path in spec.outer_links.items()
    }
    models = {role: Path(model_source(folder, spec, role, trust)) for role in spec.agents}
    types: dict[str | Edge, str] = {role: adapter_type(link.config, role) for role, link in inner.items()}
    types.update({edge: adapter_type(link.config, edge_name(edge)) for edge, link in outer.items()})
    with replacing_folder(place) as fresh:
        for role, model in models.items():
            (fresh / role).mkdir(parents=True)
            _link_model(model, fresh / role)
            if role in inner:
                _save(inner[role], fresh / role / INNER_WEIGHTS)
                _write_json(fresh / role / INNER_CONFIG, {"adapter_type": types[role]})
        (fresh / OUTER).mkdir()
        entries = _outer_entries(family, outer, types)
        for edge, entry in entries.items():
            _save(outer[edge], fresh / OUTER / entry["filename"])
        manifest = {
            "format_version": 1,
            "paradigm": family.name,
            "legacy_config_filename": OUTER_CONFIG,
            "adapters": list(entries.values()),
        }
        _write_json(fresh / OUTER / OUTER_MANIFEST, manifest)
        companion = {
            f"{entry['legacy_key']}_{suffix}": entry[name]
            for entry in entries.values()
            for name, suffix in (("adapter_type", "type"), ("in_dim", "in_dim"), ("out_dim", "out_dim"))
        }
        _write_json(fresh / OUTER / OUTER_CONFIG, companion)
        written = [path.relative_to(fresh) for path in sorted(fresh.glob("*/*.pt")) if not path.is_symlink()]
    return [place / path for path in written]


def _family(folder: Path, spec: SystemSpec) -> Family:
    for family in FAMILIES:
        if family.pattern == spec.pattern:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{folder}: its pattern is not one the reference implementation has: {known}")


def _edge(key: LinkKey, folder: Path) -> Edge:
    if len(key) == 3:
        raise ValueError(
            f"{folder}: outer link {edge_name(key)} is that of one round; in the reference implementation all rounds "
            "share an edge's link"
        )
    return key


def _outer_entries(
    family: Family, links: Mapping[Edge, FusedRecursiveLink], types: Mapping[str | Edge, str]
) -> dict[Edge, dict[str, Any]]:
    return {
        edge: {
            "legacy_key": key,
            "legacy_filename": f"{key}.pt",
            "filename": f"{key}.pt",
            "source_role": edge[0],
            "target_role": edge[1],
            "adapter_type": types[edge],
            "in_dim": links[edge].config.in_features,
            "out_dim": links[edge].config.out_features,
        }
        for key, edge in family.edges.items()
        if edge in links
    }


def _link_model(model: Path, role: Path) -> None:
    """Symbolic links to a local model's files, its own link files left out; nothing for a model on the hub."""
    for path in sorted(model.iterdir()) if model.is_dir() else []:
        if path.is_file() and path.suffix != ".pt" and path.name not in (INNER_CONFIG, INNER_MANIFEST):
            (role / path.name).symlink_to(path.resolve())


def _own_link(folder: Path) -> FusedRecursiveLink:
    try:
        return FusedRecursiveLink.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error}") from None


def _save(link: FusedRecursiveLink, path: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in link.state_dict().items()}
    with replacing(path) as file:
        torch.save(state, file)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
