"""Where the parts of a system are: in its folder, in another one, or on the hub. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recmas.config.system_json import FILE_NAME, SystemSpec
from recmas.files.reading import OUTSIDE, inside, sha256

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_HUB = "if you trust that, allow it with --allow-hub (allow_hub=True)"


@dataclass(frozen=True)
class Trust:
    """What the folder of a system may lead to. A folder that was downloaded is data: by itself it leads nowhere.

    Attributes:
        outside: to other folders, by a path or by a symbolic link.
        hub: to models on the hub; without it the hub is never asked anything.
    """

    outside: bool = False
    hub: bool = False


def part(folder: Path, spec: SystemSpec, name: str, key: str, trust: Trust) -> Path:
    """The link or file `name` of the system in `folder`, with the content that it was saved with.

    Args:
        folder: of the system.
        spec: its ``system.json``; a content is compared where this holds its sha256.
        name: as the file names it.
        key: begins messages.
        trust: of the folder.

    Raises:
        ValueError: `name` leads out of the folder, or a content is another one.
    """
    if not trust.outside:
        _check_inside(folder, name, key)
    for file, digest in spec.sha256.items() if (folder / name).exists() else ():
        if file == name or file.startswith(f"{name}/"):
            if not trust.outside:
                _check_inside(folder, file, key)
            _check_content(folder / file, digest)
    return folder / name


def model_source(folder: Path, spec: SystemSpec, role: str, trust: Trust) -> str:
    """Where the model of a role of the system in `folder` is: a folder, or a hub id.

    Contents are compared as `part` does.

    Raises:
        ValueError: there is no such folder, `trust` does not reach so far, or a content is another one.
    """
    key, model = f"{folder / FILE_NAME}: agents.{role}.model", spec.agents[role].model
    if (folder / model).is_dir():
        return str(part(folder, spec, model, key, trust))
    if model.startswith("agents/") or not (is_hub_id(model) or Path(model).is_dir()):
        raise ValueError(f"{key}: no such folder: {folder / model}")
    if Path(model).is_dir():
        if not trust.outside:
            raise ValueError(f"{key}: {model} is not in {folder}; {OUTSIDE}")
    elif not trust.hub:
        raise ValueError(f"{key}: {model} is a model on the hub; {_HUB}")
    return model


def needed_flags(folder: Path, spec: SystemSpec) -> list[str]:
    """The options by which a command allows what the system in `folder` leads to."""
    models = {agent.model for agent in spec.agents.values()}
    hub = {model for model in models if not (folder / model).is_dir() and not Path(model).is_dir()}
    outside = {model for model in models - hub if not (folder / model).resolve().is_relative_to(folder.resolve())}
    return ["--allow-outside"] * bool(outside) + ["--allow-hub"] * bool(hub)


def checksums(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """sha256 of the files in these parts, but for the weights of models, which may take minutes to read."""
    found = {}
    for name in parts:
        for path in [folder / name, *sorted((folder / name).rglob("*"))]:
            file = path.relative_to(folder).as_posix()
            if path.is_file() and (file.startswith("links/") or path.suffix not in _WEIGHTS):
                found[file] = sha256(path)
    return found


def is_hub_id(model: str) -> bool:
    """Whether a name that is no folder can be a model's on the hub: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(model) is not None


def model_key(source: str) -> str:
    """What distinguishes models: the folder or file that a path leads to, or a hub id."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _check_inside(folder: Path, name: str, key: str) -> None:
    try:
        inside(folder, name, key)
    except ValueError as error:
        raise ValueError(f"{error}; {OUTSIDE}") from None


def _check_content(path: Path, digest: str) -> None:
    try:
        found = sha256(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, but {FILE_NAME} has its sha256") from None
    if found != digest:
        raise ValueError(
            f"{path}: is damaged or was changed, its sha256 is not the one in {FILE_NAME}; if you changed it, delete "
            "its line there"
        )
