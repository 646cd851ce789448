"""What came of a cell: its accuracy with an interval, and the means of what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recmas.evaluation.intervals import pass_at, wilson
from recmas.evaluation.records import Record


@dataclass(frozen=True)
class Estimate:
    """A share of questions between the bounds of Wilson's 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Over all records of one cell.

    Attributes:
        mode, rounds, steps: the cell.
        questions, samples: rows, and answers to each; correct: correct answers among all of them.
        accuracy: mean over questions of the share of correct samples, which is pass@1.
        pass_at: pass@k for k = 2, 4, 8, ... and the number of samples.
        text_tokens, latent_steps, seconds, tool_calls: means per answer, over all agents.
        stages: mean seconds per answer by stage; peak_memory: largest of the records', bytes.
    """

    mode: str
    rounds: int
    steps: int | dict[str, int]
    questions: int
    samples: int
    correct: int
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    text_tokens: float
    latent_steps: float
    seconds: float
    stages: dict[str, float]
    peak_memory: int
    tool_calls: float


def summarize(records: Sequence[Record]) -> Summary:
    """The summary of one cell's records, which hold as many samples of every question.

    Raises:
        ValueError: no records, or of several cells.
    """
    cells = [record.cell for record in records]
    if not cells or any(cell != cells[0] for cell in cells):
        raise ValueError("records: expected those of one cell, at least one")
    verdicts: dict[int, list[bool]] = defaultdict(list)
    stages: dict[str, float] = defaultdict(float)
    for record in records:
        verdicts[record.index].append(record.correct)
        for stage, seconds in record.seconds.items():
            stages[stage] += seconds / len(records)
    samples = min(map(len, verdicts.values()))

    def estimate(k: int) -> Estimate:
        total = sum(pass_at(k, len(given), sum(given)) for given in verdicts.values())
        return Estimate(total / len(verdicts), *wilson(total, len(verdicts)))

    depths = {2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples}
    return Summary(
        *cells[0],
        questions=len(verdicts),
        samples=samples,
        correct=sum(record.correct for record in records),
        accuracy=estimate(1),
        pass_at={k: estimate(k) for k in sorted(depths - {1})},
        text_tokens=sum(record.text_tokens for record in records) / len(records),
        latent_steps=sum(record.latent_steps for record in records) / len(records),
        seconds=sum(stages.values()),
        stages=dict(stages),
        peak_memory=max(record.peak_memory for record in records),
        tool_calls=sum(record.tool_calls for record in records) / len(records),
    )


def table(summaries: Sequence[Summary]) -> str:
    """A line per cell under a line of headings, in columns."""
    lines = [_columns(summary) for summary in summaries]
    texts = [list(lines[0]), *([line.get(name, "") for name in lines[0]] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in texts
    )


def _columns(summary: Summary) -> dict[str, str]:
    steps: Any = summary.steps
    if isinstance(steps, dict):
        steps = ",".join(f"{role}={count}" for role, count in steps.items())
    shares = {"accuracy": summary.accuracy, **{f"pass@{k}": share for k, share in summary.pass_at.items()}}
    return {
        "mode": summary.mode,
        "rounds": str(summary.rounds),
        "steps": str(steps),
        "questions": str(summary.questions),
        **{name: f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]" for name, share in shares.items()},
        "text tokens": f"{summary.text_tokens:.1f}",
        "latent steps": f"{summary.latent_steps:.1f}",
        "tool calls": f"{summary.tool_calls:.1f}",
        "ms": f"{1000 * summary.seconds:.1f}",
        "peak MiB": f"{summary.peak_memory / 2**20:.0f}",
    }
