"""One record per answered question, and the file that keeps them across interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recmas.files.json_lines import OtherRunError, append_lines, read_lines

MODES = ("latent", "text", "single", "loop")
_BEGINNING = '{"mode": "'  # of every line that `append` writes
UNITS = ("seconds", "tokens")
"""Of a budget. Tokens are those that all agents write, and their latent steps; what they read is not counted."""


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
            most that this process ever held resident up to its batch's end; agents in other processes are not counted.
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

    def record(line: dict[str, Any]) -> Record:
        found = Record(**line)
        if found.key != key(found.cell, found.sample, found.index):
            raise OtherRunError
        return found

    return {done.key: done for done in read_lines(path, record, "a record of an evaluation", _BEGINNING)}


def append(path: Path, records: Sequence[Record]) -> None:
    """Write records behind those that are there, to the disk itself."""
    append_lines(path, map(asdict, records))
