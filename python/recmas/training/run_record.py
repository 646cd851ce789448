"""What a run was begun with, beside its checkpoints: ``run.json`` with its data, settings and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from recmas.files.reading import inside, read_json
from recmas.prompts.rows import Fields
from recmas.training.config import LoopConfig, is_of_a_stage, settings_of
from recmas_kernels import __version__

RUN = "run.json"


def described(source: str, rows: Sequence[Fields]) -> dict[str, Any]:
    """Rows by name, number and sha256; the same rows from another kind of file have the same digest."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"source": source, "rows": len(rows), "sha256": digest.hexdigest()}


def run_record(config: LoopConfig, data: dict[str, Any], validation: dict[str, Any] | None) -> str:
    """The content of a run's ``run.json``; `data` and `validation` are `described`, None where there are none."""
    versions = {"recmas": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    record = {"data": data, "validation": validation, "settings": settings_of(config), "versions": versions}
    return json.dumps(record, indent=1) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says; None where it says nothing.

    Raises:
        ValueError: it cannot be read.
    """
    inside(folder, RUN, str(folder))
    if not (folder / RUN).exists():
        return None
    record = read_json(folder / RUN)
    if not _is_record(record):
        raise ValueError(f"{folder / RUN}: does not say what the run was begun with")
    return record


def _is_record(found: Any) -> bool:
    """Whether this is what `run_record` writes; a run without validation rows may lack them."""
    return (
        isinstance(found, dict)
        and _is_described(found.get("data"))
        and (found.get("validation") is None or _is_described(found["validation"]))
        and isinstance(found.get("settings"), dict)
        and is_of_a_stage(found["settings"])
        and isinstance(found.get("versions"), dict)
    )


def _is_described(rows: Any) -> bool:
    return isinstance(rows, dict) and {"source", "rows", "sha256"} <= rows.keys()


def check_data(folder: Path, data: dict[str, Any], validation: dict[str, Any] | None) -> None:
    """Raise ValueError, naming both, where a run was begun on other rows, or with other validation rows.

    The best links of a run are those with the least of all its validation losses, so all have to be of the same rows.
    """
    record = read_record(folder)
    if record is None:
        return
    for kind, given in (("data", data), ("validation", validation)):
        began = record.get(kind)
        if _digest(began) != _digest(given):
            raise ValueError(f"{folder}: was begun on {_named(kind, began)}, this run has {_named(kind, given)}")


def _digest(rows: dict[str, Any] | None) -> object:
    return None if rows is None else rows["sha256"]


def _named(kind: str, rows: dict[str, Any] | None) -> str:
    what = "rows" if kind == "data" else f"{kind} rows"
    if rows is None:
        return f"no {what}"
    return f"{rows['rows']} {what} of {rows['source']} (sha256 {str(rows['sha256'])[:12]})"
