"""The results folder: runs are put into it suite by suite, and read from it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.harness.record import SCHEMA
from recmas.files import write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"
GPU = "gpu"  # the kind of a device, and the one results file of such a device
ORDER = (
    "link",
    "overhead",
    "alignment",
    "frozen",
    "released",
    "rollout",
    "system",
    "cluster",
    "serving",
    "training",
    "inner",
    "processes",
    "costs",
    "handoff",
    "complexity",
)


def store(run: Path, results: Path) -> None:
    """Put the records of a run into ``results``, one file per suite (of a GPU run all in one), each replaced whole.

    Raises:
        ValueError: the file is no such run, of another schema, or of the quick grid.
    """
    try:
        content = json.loads(run.read_text(encoding="utf-8"))
        meta = content["recmas"]
        records = [entry["extra_info"]["record"] for entry in content["benchmarks"] if entry["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not a benchmark run: {type(error).__name__}: {error}") from error
    if meta["schema"] != SCHEMA:
        raise ValueError(f"{run} has schema {meta['schema']}, expected {SCHEMA}")
    if meta["grid"] != "full":
        raise ValueError(f"{run} is of the {meta['grid']} grid, whose times mean nothing: run with --grid full")
    folder = results / meta["device"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    suites = defaultdict(list)
    for record in records:
        suites[GPU if _is_gpu(meta) else record["suite"]].append(record)
    for suite, members in suites.items():
        head = json.dumps(meta, indent=1)[1:-2].strip()
        lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in members)
        write_atomically(folder / f"{suite}.json", "{" + head + ',\n "records": [\n' + lines + "\n]}\n")


def _is_gpu(head: dict[str, Any]) -> bool:
    return head["device"].get("kind") == GPU


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The stored suites of a device, by name, in the order of the report.

    Raises:
        ValueError: a file of another machine's numbers is among them, which no table may mix.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    for name, suite in found.items():
        if (slug := suite["device"]["slug"]) != folder.name:
            raise ValueError(f"{folder / name}.json was measured on {slug}: machines are not mixed in one table")
    return {name: found[name] for name in sorted(found, key=lambda name: (*ORDER, name).index(name))}
