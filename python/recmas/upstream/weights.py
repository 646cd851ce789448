"""The reference implementation's folders: which file holds which link, of what type and width."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recmas.config.pattern import Edge
from recmas.errors import first_line
from recmas.upstream.styles import HUB_ORGANISATION, OUTER, Family, Style

INNER_WEIGHTS, INNER_CONFIG, INNER_MANIFEST = "adapter.pt", "adapter_config.json", "innerlink_config.json"
OUTER_MANIFEST, OUTER_CONFIG = "outerlink_config.json", "outer_adapter_config.json"
_FROM_HUB = {
    OUTER: ["*.json", "*.pt"],
    "role": ["config.json", INNER_CONFIG, INNER_MANIFEST, "adapter*.pt"],
}


@dataclass(frozen=True)
class Place:
    """A repository of the reference implementation: the folder with its link files, and what loads its model."""

    folder: Path
    model: str  # absolute path or hub id


@dataclass(frozen=True)
class OuterFile:
    """One outer link's file, and what a manifest says of it."""

    path: Path
    adapter_type: str | None
    in_features: int | None
    out_features: int | None
    manifest: Path


def find_places(style: Style, weights: Path | None, overrides: Mapping[str, str]) -> dict[str, Place]:
    """Where each role and `OUTER` stands: its override, else inside `weights`, else (without `weights`) on the hub.

    Raises:
        ValueError: an unknown key, or a folder that does not exist.
    """
    for key in overrides:
        if key not in style.repositories:
            raise ValueError(f"override: unknown key {key!r}; the style has {', '.join(style.repositories)}")
    if weights is not None and not weights.is_dir():
        raise ValueError(f"weights: no such folder: {weights}")
    places, remote = {}, {}
    for key, repository in style.repositories.items():
        if key in overrides:
            folder = Path(overrides[key]).expanduser()
            if folder.is_dir():
                places[key] = Place(folder, str(folder.resolve()))
            elif re.fullmatch(r"[\w.-]+/[\w.-]+", overrides[key]) and not overrides[key].startswith("."):
                remote[key] = overrides[key]
            else:
                raise ValueError(f"override: no such folder for {key!r}: {folder}")
        elif weights is not None:
            found = next((weights / name for name in (repository, key) if (weights / name).is_dir()), None)
            if found is None:
                raise ValueError(f"weights: {weights} holds no folder for {key!r}: neither {repository} nor {key}")
            places[key] = Place(found, str(found.resolve()))
        else:
            remote[key] = f"{HUB_ORGANISATION}/{repository}"
    # The hub is asked last: a mistake in a local path is an error before anything is downloaded.
    return {key: places[key] if key in places else _from_hub(key, remote[key]) for key in style.repositories}


def _from_hub(key: str, repository: str) -> Place:
    """The link files of a hub repository (not its model's weights)."""
    from huggingface_hub import snapshot_download

    patterns = _FROM_HUB.get(key, _FROM_HUB["role"])
    try:
        return Place(Path(snapshot_download(repository, allow_patterns=patterns)), repository)
    except Exception as error:  # the hub's client raises its own, and those of what it is built on
        raise ValueError(f"{key}: cannot get {repository} from the hub: {first_line(error)}") from error


def model_width(role: str, place: Place) -> int:
    """Hidden size of a role's model, from its configuration."""
    from transformers import AutoConfig

    if not (place.folder / "config.json").is_file():
        raise ValueError(f"{role}: {place.folder} has no config.json, expected the base model beside its link")
    try:
        config = AutoConfig.from_pretrained(place.folder)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{role}: cannot read {place.folder / 'config.json'}: {str(error).splitlines()[0]}") from error
    return int(config.get_text_config(decoder=True).hidden_size)


def find_inner(role: str, folder: Path, task: str) -> tuple[Path, str | None]:
    """The inner link's file for `task` ("math" or "code"), and its type where the folder says one.

    The manifest's file for the task, else ``adapter(task).pt``, else ``adapter.pt``.
    """
    adapter_type = named_type(folder)
    if (folder / INNER_MANIFEST).is_file():
        tasks = _object(_read_json(folder / INNER_MANIFEST).get("tasks", {}), folder / INNER_MANIFEST, "tasks")
        if task in tasks:
            named = _object(tasks[task], folder / INNER_MANIFEST, f"tasks.{task}").get(INNER_WEIGHTS, INNER_WEIGHTS)
            return _member(folder, named, folder / INNER_MANIFEST), adapter_type
    for name in (f"adapter({task}).pt", INNER_WEIGHTS):
        if (folder / name).is_file():
            return folder / name, adapter_type
    others = ", ".join(sorted(path.name for path in folder.glob("adapter*.pt"))) or "no adapter file"
    raise ValueError(f"{role}: {folder} has no inner link for {task}: {others}, expected adapter({task}).pt")


def named_type(folder: Path) -> str | None:
    """What ``adapter_config.json`` in `folder` says of the inner links there; None where it says nothing."""
    path = folder / INNER_CONFIG
    adapter_type = _read_json(path).get("adapter_type") if path.is_file() else None
    if adapter_type is not None and not isinstance(adapter_type, str):
        raise ValueError(f"{path}: adapter_type is {adapter_type!r}, expected a string")
    return adapter_type


def find_outer(family: Family, folder: Path, task: str) -> dict[Edge, OuterFile]:
    """The file of every outer link: from the manifest (flat or by task), else by the names local training gives them.

    Raises:
        ValueError: neither manifest nor companion, an entry that is wrong, or a link that is missing. The links back
            to the first stage may be missing together; the system then runs one round.
    """
    manifest = folder / OUTER_MANIFEST
    if manifest.is_file():
        entries = _manifest_entries(manifest, task)
    else:
        companions = [folder / f"outer_adapter_config({task}).json", folder / OUTER_CONFIG]
        present = [path for path in companions if path.is_file()]
        if not present:
            raise ValueError(f"{OUTER}: {folder} has neither {OUTER_MANIFEST} nor {OUTER_CONFIG}")
        manifest = present[0]
        entries = _companion_entries(manifest, family)
    found = {}
    for key, entry in entries.items():
        if key not in family.edges:
            raise ValueError(f"{manifest}: unknown link {key!r}, a {family.name} system has {', '.join(family.edges)}")
        found[family.edges[key]] = OuterFile(
            _member(folder, entry["filename"], manifest),
            _typed(entry, "adapter_type", str, manifest, key),
            _typed(entry, "in_dim", int, manifest, key),
            _typed(entry, "out_dim", int, manifest, key),
            manifest,
        )
    backward = set(family.edges.values()) - family.pattern.edges(1)
    optional = backward if not backward & found.keys() else set()
    missing = [key for key, edge in family.edges.items() if edge not in found and edge not in optional]
    if missing:
        raise ValueError(f"{manifest}: no entry for {', '.join(missing)}")
    return found


def _manifest_entries(manifest: Path, task: str) -> dict[str, dict[str, Any]]:
    content = _read_json(manifest)
    if content.get("format_version", 1) != 1:
        raise ValueError(f"{manifest}: format_version is {content['format_version']!r}, this version reads 1")
    if "tasks" in content:
        tasks = _object(content["tasks"], manifest, "tasks")
        if task not in tasks:
            raise ValueError(f"{manifest}: tasks has no {task!r}, it has {', '.join(tasks) or 'none'}")
        content = _object(tasks[task], manifest, f"tasks.{task}")
    entries = content.get("adapters")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{manifest}: adapters is {entries!r}, expected a list of links")
    by_key = {}
    for entry in entries:
        _object(entry, manifest, "adapters")
        for name in ("legacy_key", "filename"):
            if not isinstance(entry.get(name), str):
                raise ValueError(f"{manifest}: {name} is {entry.get(name)!r} in an adapter, expected a string")
        by_key[entry["legacy_key"]] = entry
    return by_key


def _companion_entries(companion: Path, family: Family) -> dict[str, dict[str, Any]]:
    """The entries that ``outer_adapter_config.json`` spells as ``outer_12_type`` and so on; files are KEY.pt."""
    content = _read_json(companion)
    fields = {"adapter_type": "type", "in_dim": "in_dim", "out_dim": "out_dim"}
    return {
        key: {"filename": f"{key}.pt", **{name: content.get(f"{key}_{suffix}") for name, suffix in fields.items()}}
        for key in family.edges
        if f"{key}_type" in content or (companion.parent / f"{key}.pt").is_file()
    }


def _member(folder: Path, name: Any, manifest: Path) -> Path:
    """A file of `folder` that `manifest` names; it may not lead out of it."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{manifest}: {name!r} is not the name of a file beside it")
    if not (folder / name).is_file():
        raise ValueError(f"{manifest}: names {name}, which does not exist in {folder}")
    return folder / name


def _typed(entry: Mapping[str, Any], name: str, kind: type, manifest: Path, key: str) -> Any:
    value = entry.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{manifest}: {name} of {key} is {value!r}, expected {kind.__name__}")
    return value


def _object(value: Any, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is a {type(value).__name__}, expected an object")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    return _object(value, path, "the file")
