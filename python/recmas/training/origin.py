"""Which system an output was made of, so that its training does not go on as another one's.

The output's ``training/origin.json`` has the name of that system and the sha256 of what decides its training.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recmas.config.system_json import FILE_NAME, read_spec
from recmas.files.reading import inside, read_json, sha256

RECORD = "training/origin.json"


def origin(system: Path) -> str:
    """The record of an output that is made of the system in this folder."""
    return json.dumps({"system": str(system), "sha256": _digest(system)}) + "\n"


def check_origin(output: Path, system: Path) -> None:
    """Raise ValueError, naming both, if `output` was made of another system than this one.

    An output that another command made has no record, and is not asked.
    """
    inside(output, RECORD, str(output))
    if not (output / RECORD).exists():
        return
    record = read_json(output / RECORD)
    if not isinstance(record, dict) or not {"system", "sha256"} <= record.keys():
        raise ValueError(f"{output / RECORD}: does not say which system {output} was made of")
    if (found := _digest(system)) != record["sha256"]:
        made_of, known = record["system"], record["sha256"][:12]
        raise ValueError(
            f"--output: {output} was made of {made_of} (sha256 {known}), not of {system} as it is now ({found[:12]}); "
            f"name {output} itself as the system, or choose another --output"
        )


def _digest(system: Path) -> str:
    """sha256 of ``system.json``, which has those of links and configurations, and of the models in the folder."""
    spec = read_spec(system)
    digest = hashlib.sha256((system / FILE_NAME).read_bytes())
    for model in dict.fromkeys(agent.model for agent in spec.agents.values()):
        for path in sorted((system / model).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(system).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
