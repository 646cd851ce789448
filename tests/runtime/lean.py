"""A system whose commands are quick, one small model in every role and no chat template, and questions for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.config.system_json import PromptSpec
from tests.runtime.tiny import CORPUS, tiny_agent

PROMPTS = {
    "planner": PromptSpec("{{question}} plan:", "{{question}} {{from:solver}} plan:"),
    "critic": PromptSpec("{{question}} {{from:planner}} critique:"),
    "solver": PromptSpec("{{question}} {{from:critic}} answer:"),
}
WORDS = [*CORPUS[0].split(), "plan", "notes", "answer"]


def lean_system(seed: int = 1) -> RecursiveMAS:
    agent = tiny_agent("llama", "one", 16, seed=seed, chat_template=None)
    agents = dict.fromkeys(SEQUENTIAL.roles, agent)
    return RecursiveMAS.create(agents, SEQUENTIAL, prompts=PROMPTS, rounds=2, latent_steps=2, seed=seed)


def lean_rows(count: int = 12) -> list[dict[str, Any]]:
    """Rows of different lengths, with targets and answers."""
    rows = []
    for number in range(count):
        said = [" ".join(WORDS[(number + at) % len(WORDS) :][: 1 + (number + at) % 4]) for at in range(4)]
        targets = dict(zip(SEQUENTIAL.roles, said[1:], strict=True))
        rows.append({"question": f"{number} {said[0]}", "answer": said[3], "targets": targets})
    return rows


def write_lean(folder: Path) -> Path:
    """`folder` with ``system`` and ``rows.jsonl``."""
    lean_system().save_pretrained(folder / "system")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lean_rows()))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but for locks, by its path; a link and an empty folder have one, too."""
    found = {}
    for place, folders, files in os.walk(folder):
        at = os.path.relpath(place, folder)
        for name in (*folders, *files):
            path, key = os.path.join(place, name), os.path.normpath(os.path.join(at, name))
            if os.path.islink(path):
                found[key] = b"-> " + os.readlink(path).encode()
            elif name in folders:
                found[f"{key}/"] = b""
            elif os.path.isfile(path) and not name.endswith(".lock"):
                with open(path, "rb") as file:
                    found[key] = file.read()
    return found
