"""Where the models of a system are: in its folder, in another one, or on the hub. No torch here."""

from __future__ import annotations

from pathlib import Path

from recmas.config.system_json import FILE_NAME


def model_source(folder: Path, role: str, model: str) -> str:
    """Where the model of a role of the system in `folder` is: a folder, or a hub id.

    Raises:
        ValueError: a model of the system's own folder that is not there.
    """
    if (folder / model).is_dir():
        return str(folder / model)
    if model.startswith("agents/"):
        raise ValueError(f"{folder / FILE_NAME}: agents.{role}.model: no such folder: {folder / model}")
    return model


def model_key(source: str) -> str:
    """What distinguishes models: the folder that a path leads to, or a hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source
