"""A trained system's model card: the ``README.md`` that says what its links were trained on, how, and how well.

The card ends with a line that holds the sha256 of what stands above it. A file without that line, or with another text
above it, was written or changed by a person, and is never replaced.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from recmas.config.system_json import SystemSpec, edge_name
from recmas.files import write_atomically
from recmas.training.config import ALWAYS_TOLD, changed_settings
from recmas.training.run_record import read_record
from recmas.training.step_log import TrainingResult, read_log

CARD = "README.md"
_OWN = re.compile(r"<!-- written by recmas train, sha256 of the above ([0-9a-f]{64}) -->\n?")


def write_card(folder: Path, spec: SystemSpec) -> bool:
    """Write the card of the trained system in `folder`; whether it was written, and not a person's file left alone."""
    place = folder / CARD
    if place.is_symlink() or (place.exists() and not _is_own(place)):
        return False
    text = card(folder, spec)
    write_atomically(place, f"{text}<!-- written by recmas train, sha256 of the above {_digest(text)} -->\n")
    return True


def card(folder: Path, spec: SystemSpec) -> str:
    """The card's text: parts, runs, settings, data and versions, as the runs' folders below ``training/`` say them."""
    runs = read_runs(folder / "training")
    stages = " > ".join(", ".join(stage) for stage in spec.pattern.stages)
    agents = [[f"`{role}`", f"`{agent.model}`", agent.inner_link or "none"] for role, agent in spec.agents.items()]
    settings = {run: _told(record["settings"]) for run, record, _ in runs}
    data = {
        tuple(map(str, (d["source"], d["rows"], d["sha256"]))): None for _, record, _ in runs if (d := record["data"])
    }
    versions = {name: version for _, record, _ in runs for name, version in record["versions"].items()}
    parts = [
        "---\nlibrary_name: recmas\ntags: [recmas, latent-reasoning, multi-agent]\n---",
        f"# A recursive multi-agent system: {stages}",
        "The agents pass latents to each other through trained links (RecursiveMAS, arXiv 2604.25917); their models are"
        ' frozen.\nAnswer with it: `recmas run FOLDER --question "..."`.',
        _table(["agent", "model", "inner link"], agents),
        "Outer links: " + ", ".join(f"`{edge_name(key)}`" for key in spec.outer_links) + ". "
        f"Rounds: {spec.defaults.rounds}, latent steps: {spec.defaults.latent_steps}.",
        "## Training",
        _table(
            ["run", "steps", "first loss", "loss (last tenth)", "best validation loss"],
            [[f"`{run}`", *_losses(result)] for run, _, result in runs],
        ),
        "## Settings",
        "\n".join(f"- `{run}`: {told}" for run, told in settings.items()),
        "## Data",
        _table(["source", "rows", "sha256"], [list(one) for one in data]),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def read_runs(logs: Path) -> list[tuple[str, dict[str, Any], TrainingResult]]:
    """The runs below `logs` that have done a step: name, record and result of each.

    Raises:
        ValueError: a record or a log cannot be read.
    """
    return [
        (path.name, record, result)
        for path in sorted(logs.glob("*"))
        if (record := read_record(path) if path.is_dir() else None) and (result := read_log(path)).records
    ]


def _losses(result: TrainingResult) -> list[str]:
    best = result.best
    validation = "" if best is None else f"{best.validation:.4f} (step {best.step})"
    return [f"{result.steps:,}", f"{result.records[0].loss:.4f}", f"{result.loss:.4f}", validation]


def _told(settings: dict[str, Any]) -> str:
    """The number of steps and rows, the rate, and what is not a stage's default."""
    told = {*ALWAYS_TOLD, *changed_settings(settings)}
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name in told)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _is_own(place: Path) -> bool:
    if not place.is_file():
        return False
    text = place.read_text(encoding="utf-8", errors="replace")
    above, _, last = text.rstrip("\n").rpartition("\n")
    found = _OWN.fullmatch(last)
    return found is not None and found.group(1) == _digest(above + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
