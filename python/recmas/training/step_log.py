"""The log of a run: ``log.jsonl`` in its folder, one `StepRecord` per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recmas.files import write_atomically
from recmas.files.reading import open_regular
from recmas.files.writing import naming

LOG = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One line of the log; ``step`` counts finished steps, so the first is 1.

    ``seconds`` has the run itself taken since it began or was resumed, without those of other runs in between;
    ``grad_norms`` are those of the links, where several are trained, and ``round_norms`` of each link by round, where
    they were asked for; ``validation`` is the loss on the validation rows after the step, where it was measured;
    ``tokens`` were read in the step, by all processes.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    grad_norms: dict[str, float] = field(default_factory=dict)
    validation: float | None = None
    round_norms: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """What a loop did: finished steps in all, and their records; of a resumed run, the earlier steps' from its log."""

    steps: int
    records: list[StepRecord] = field(repr=False)

    @property
    def loss(self) -> float:
        """Mean loss over the last tenth of the steps."""
        last = self.records[-max(1, len(self.records) // 10) :]
        return sum(record.loss for record in last) / len(last) if last else math.nan

    @property
    def best(self) -> StepRecord | None:
        """The step after which the validation rows' loss was least; its links are the ones that were kept."""
        measured = [record for record in self.records if record.validation is not None]
        return min(measured, key=lambda record: record.validation or 0.0, default=None)


def append_record(folder: Path, record: StepRecord) -> None:
    """One more line of the log in this folder."""
    with naming(folder / LOG), open(folder / LOG, "a", encoding="utf-8") as log:
        log.write(_line(record))


def write_records(folder: Path, records: Iterable[StepRecord]) -> None:
    """The log in this folder, replaced whole."""
    write_atomically(folder / LOG, "".join(map(_line, records)))


def read_log(folder: Path) -> TrainingResult:
    """What the run in this folder has done, by its log.

    Raises:
        ValueError: a line is no record.
    """
    records = list(logged(folder))
    return TrainingResult(len(records), records)


def logged(folder: Path) -> Iterator[StepRecord]:
    """Records of the log in this folder, but for a last line that a crash cut short.

    Raises:
        ValueError: a line is no record.
    """
    log = folder / LOG
    if not log.exists():
        return
    with open_regular(log) as file:
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                yield StepRecord(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{log}, line {number}: not a record of a training step") from None


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record)) + "\n"
