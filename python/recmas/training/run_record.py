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
from recmas.training.config import LoopConfig
from recmas.training.loop import settings_of
from recmas_kernels import __version__

RUN = "run.json"


def described(source: str, rows: Sequence[Fields]) -> dict[str, Any]:
    """Rows by name, number and sha256; the same rows from another kind of file have the same digest."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"source": source, "rows": len(rows), "sha256": digest.hexdigest()}


def run_record(config: LoopConfig, data: dict[str, Any]) -> str:
    """The content of a run's ``run.json``; `data` is `described`."""
    versions = {"recmas": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return json.dumps({"data": data, "settings": settings_of(config), "versions": versions}, indent=1) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says; None where it says nothing.

    Raises:
        ValueError: it cannot be read.
    """
    inside(folder, RUN, str(folder))
    if not (folder / RUN).exists():
        return None
    record = read_json(folder / RUN)
    if not isinstance(record, dict) or not isinstance(record.get("data"), dict):
        raise ValueError(f"{folder / RUN}: does not say what the run was begun with")
    return record


def check_data(folder: Path, data: dict[str, Any]) -> None:
    """Raise ValueError, naming both, where a run was begun on other rows than it would go on with."""
    record = read_record(folder)
    if record is None or record["data"].get("sha256") == data["sha256"]:
        return
    known, found = (
        f"{each.get('rows')} rows of {each.get('source')} (sha256 {str(each.get('sha256'))[:12]})"
        for each in (record["data"], data)
    )
    raise ValueError(f"{folder}: was begun on {known}, this run has {found}")
