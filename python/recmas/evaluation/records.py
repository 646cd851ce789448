"""One record per answered question, and the file that keeps them across interrupts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

MODES = ("latent", "text", "single", "loop")
_BEGINNING = b'{"mode": "'  # of every line that `append` writes


class Cell(NamedTuple):
    """One point of a sweep: what passes between whom (a mode), rounds, and latent steps per message.

    `steps` is a number where all agents have the same, else a number by role; 0 in modes that think no latents.
    """

    mode: str
    rounds: int
    steps: int | dict[str, int]


@dataclass(frozen=True)
class Record:
    """One answered question.

    Attributes:
        mode, rounds, steps: the cell.
        sample: from 0; index: of the question's row.
        key: digest of cell, sample, row, settings and system.
        text: what the last agent wrote; expected: the row's answer; correct: the metric's verdict.
        text_tokens: tokens of text written for it by all agents; latent_steps: latent steps of all agents.
        seconds: by stage, its batch's time divided by the batch's questions.
        peak_memory: bytes; where agents are on GPUs, the most that tensors held on these while its batch ran, else the
            most that this process ever held resident up to its batch's end.
        tool_calls: of tools, while the answer was written.
    """

    mode: str
    rounds: int
    steps: int | dict[str, int]
    sample: int
    index: int
    key: str
    text: str
    expected: str
    correct: bool
    text_tokens: int
    latent_steps: int
    seconds: dict[str, float]
    peak_memory: int
    tool_calls: int

    @property
    def cell(self) -> Cell:
        return Cell(self.mode, self.rounds, self.steps)


def read(path: Path, key: Callable[[Cell, int, int], str | None]) -> dict[str, Record]:
    """Records of earlier calls, by key; a last line that was cut short is removed from the file.

    Args:
        path: JSON lines; it need not exist.
        key: of a cell, sample and row number in this run; None if there is no such row.

    Raises:
        ValueError: a line that is no record, or one of another run; names file and line. The file stays as it is.
    """
    if not path.exists():
        return {}
    *lines, cut = path.read_bytes().split(b"\n")
    done: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = Record(**json.loads(line))
            expected = key(record.cell, record.sample, record.index)
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: not a record of an evaluation") from None
        if record.key != expected:
            raise ValueError(
                f"{path}, line {number}: of another system, other settings or other rows; use another file"
            )
        done[record.key] = record
    if cut:
        if not (cut.startswith(_BEGINNING) or _BEGINNING.startswith(cut)):
            raise ValueError(f"{path}, line {len(lines) + 1}: not a record of an evaluation")
        os.truncate(path, path.stat().st_size - len(cut))
    return done


def append(path: Path, records: Sequence[Record]) -> None:
    """Write records behind those that are there, to the disk itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
