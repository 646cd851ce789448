"""``pytest benchmarks --compare``: every claimed ratio of a run against the committed record of the same machine type.

A machine type is what names a results folder: the processor, its family and model, what it imitates, the number of
threads. A claimed ratio is a cell's speed-up over the peer of its goal. Times themselves are not compared: they differ
between machines of one type by more than ratios do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.stored import load
from benchmarks.report.tables import unmeasured_in

WORSE = 0.15
"""A ratio that is smaller than the committed one by more than this share of it has become worse."""
LABELS = ("suite", "op", "shape", "dtype", "pass", "tokens", "cache", "graph")

Cell = tuple[Any, ...]
"""A cell's labels, and the peer of its goal."""


class Claimed(NamedTuple):
    """A speed-up; of a peer beyond its time bound only the least that it can be is known (``bound``)."""

    value: float
    bound: bool

    def __str__(self) -> str:
        return f"{'at least ' if self.bound else ''}{self.value:.2f}x"


@dataclass
class Comparison:
    """A run's claimed ratios beside those of one machine type's record.

    Attributes:
        slug: of the machine type.
        stored: the committed ratios.
        compared: how many of the run have been compared.
        worse: a line for each that has become worse.
        unknown: names of cells that only the run has.
    """

    slug: str
    stored: Mapping[Cell, Claimed]
    compared: int = 0
    worse: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def with_committed(cls, results: Path, slug: str) -> Comparison:
        """With the record that ``results`` holds of this machine type.

        Raises:
            ValueError: there is none, or its files come from several machine types.
        """
        records = [record for suite in load(results / slug).values() for record in suite["records"]]
        stored = {cell_of(record): ratio for record in records if (ratio := _ratio(record)) is not None}
        if not stored:
            known = ", ".join(sorted(path.name for path in results.iterdir() if path.is_dir())) or "nothing"
            raise ValueError(f"no record of this machine type, {slug}; {results} holds {known}")
        return cls(slug, stored)

    def add(self, record: Mapping[str, Any]) -> None:
        """Compare a record of the run; one that claims no ratio is passed over."""
        if _peer(record) is None:
            return
        now, then, name = _ratio(record), self.stored.get(cell_of(record)), _name(record)
        if then is None or now is None:
            self.unknown.append(f"{name}: {'no such cell in the record' if then is None else 'the peer was not run'}")
            return
        self.compared += 1
        if now.value < (1 - WORSE) * then.value:
            less = 100 * (1 - now.value / then.value)
            self.worse.append(f"{name}: then {then}, now {now}, {less:.0f}% less")

    @property
    def failed(self) -> bool:
        """A ratio has become worse, or none could be compared."""
        return bool(self.worse) or not self.compared

    def lines(self) -> Iterator[str]:
        """What was found, for people."""
        yield from (f"worse: {line}" for line in self.worse)
        yield from (f"not compared: {line}" for line in self.unknown)
        compared = f"{self.compared} claimed ratios compared with the record of {self.slug}"
        yield f"{compared}, {len(self.worse)} worse by more than {100 * WORSE:.0f}%"
        if not self.compared:
            yield "failed: this run measured no claimed ratio that the record has"


def cell_of(record: Mapping[str, Any]) -> Cell:
    return (*(record.get(label) for label in LABELS), _peer(record))


def _peer(record: Mapping[str, Any]) -> str | None:
    """Of the record's goal; None where it has none or one of another kind, such as an exponent's."""
    return None if record["goal"] is None else record["goal"].get("peer")


def _ratio(record: Mapping[str, Any]) -> Claimed | None:
    """The speed-up over the goal's peer; None without such a goal, or where the peer was not run."""
    peer = _peer(record)
    if peer is None:
        return None
    if peer in record["ratios"]:
        return Claimed(record["ratios"][peer]["value"], bound=False)
    least = unmeasured_in(record)[peer]["at_least"]
    return None if least is None else Claimed(least, bound=True)


def _name(record: Mapping[str, Any]) -> str:
    where = " ".join(str(record[label]) for label in ("suite", "op", "shape", "dtype", "pass"))
    return f"{where} T={record['tokens']} ({record['cache']}) over {_peer(record)}"
