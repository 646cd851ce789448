"""Accuracy against seconds: every way of telling whose turns were timed, beside what it answers.

Accuracies are on the questions of one hop that were asked in most of these ways, through general links of most seeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.link_seeds import interval
from benchmarks.trio.links import NOTES
from benchmarks.trio.page import Row, gap, task_of
from benchmarks.trio.times import FLOAT32


class Way(NamedTuple):
    """A way of telling, its seconds per question with so many at once, and its answers."""

    message: str
    at_once: int
    seconds: float
    row: Row

    @property
    def latent(self) -> bool:
        return self.message.startswith("latents")


def ways(rows: Sequence[Row], times: Sequence[dict[str, Any]]) -> list[Way]:
    """All that were both timed and asked the same questions, the fastest first, by number of questions at once."""
    counts = {row.questions for row in rows}
    found = [
        [*_asked([row for row in rows if row.questions == count], times)] for count in sorted(counts, reverse=True)
    ]
    return sorted(max(found, key=len, default=[]), key=lambda way: (way.at_once, way.seconds))


def _asked(rows: Sequence[Row], times: Sequence[dict[str, Any]]) -> Iterator[Way]:
    for one in (each for each in times if each["dtype"] == FLOAT32):
        message = re.sub(r"\b1 token$", "1 tokens", one["way"])
        same = [row for row in rows if row.message == message and "task" not in row.links and _plain(row)]
        if same:
            yield Way(one["way"], one["batch"], one["seconds"], max(same, key=lambda row: len(row.audits)))


def _plain(row: Row) -> bool:
    return row.audits[0]["hops"] == 1 and task_of(row.audits[0]) == NOTES


def beaten(way: Way, others: Sequence[Way]) -> Way | None:
    """The first text that takes less time and is shown to answer more; None leaves the way on the frontier."""
    for other in others:
        if not other.latent and other.at_once == way.at_once and other.seconds < way.seconds:
            found = gap(way.row, other.row, "correct")
            if found.low > 0 and found.shown:
                return other
    return None


def table(rows: Sequence[Row], times: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line per way, and what beats it, as Markdown."""
    found = ways(rows, times)
    if not found:
        return
    heads = ["questions at once", "message", "seconds per question", "links", "link seeds", "questions", "accuracy"]
    heads.append("faster text that answers more")
    yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for way in found:
        share, low, high = interval(way.row.values("correct"))
        seeds, other = "", ""
        if way.latent:
            better = beaten(way, found)
            seeds, other = str(len(way.row.audits)), "none" if better is None else better.message
        cells = [str(way.at_once), way.message, f"{way.seconds:.2f}", way.row.links, seeds, str(way.row.questions)]
        yield f"| {' | '.join([*cells, f'{share:.2f} [{low:.2f}, {high:.2f}]', other])} |"
