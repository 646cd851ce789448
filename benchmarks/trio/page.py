"""The tables of a pair of models, as Markdown: links, accuracies beside texts, seed by seed, and times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.link_seeds import change, interval
from benchmarks.trio.cells import TEST
from benchmarks.trio.links import NOTES
from recmas.evaluation.paired import Difference, paired_means
from recmas.lab.notes import HALVES


class Row(NamedTuple):
    """A line of the accuracies: what was sent, through links of which seeds, and the audits of each seed."""

    message: str
    links: str
    audits: list[dict[str, Any]]

    def values(self, kind: str) -> list[list[float]]:
        """By seed and question: ``correct`` or ``nll``."""
        return [[float(value) for value in one[kind]] for one in self.audits]

    def half(self, place: int) -> Row:
        """The same of one half of names and values, which questions are of by turns."""
        parts = [{kind: one[kind][place :: len(HALVES)] for kind in ("correct", "nll")} for one in self.audits]
        return Row(self.message, self.links, parts)

    @property
    def questions(self) -> int:
        return len(self.audits[0]["correct"])


def tables(pair: str, record: dict[str, Any]) -> str:
    """All of one pair of models."""
    rows = rows_of(record)
    parts = [
        f"### {pair.replace('-', ' → ')}",
        *_links(record["links"]),
        *_accuracies(rows),
        *_halves(rows),
        *_seeds(rows),
        *_outer(record["links"]),
    ]
    return "\n".join([*parts, *_times(record["time"])])


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The lines of the accuracies: of the test's questions, in their order."""
    return sorted(pooled([one for one in record["audit"] if one["seed"] == TEST]), key=_order)


def pooled(audits: Sequence[dict[str, Any]]) -> list[Row]:
    """Audits of the same message, questions and kind of links together, whatever the links' seeds."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for one in audits:
        kind = "" if one["arm"] == "text" else kind_of(one["links"])
        asked = (one["hops"], task_of(one))
        key = (one["arm"], one["steps"], one["tokens"], *asked, len(one["correct"]), kind)
        groups.setdefault(key, {}).setdefault(one["links"] if kind else "", one)
    return [
        Row(_name(*key[:5]), key[6], [members[links] for links in sorted(members)]) for key, members in groups.items()
    ]


def task_of(audit: dict[str, Any]) -> str:
    """Whose questions an audit asks; older records know the notes task alone."""
    return str(audit.get("task", NOTES))


def kind_of(links: str) -> str:
    """What links of all seeds have in common, such as "1600 lists", of a name such as 1600-3 or 1600-3-task."""
    lists, _, *task = links.split("-")
    return f"{lists} lists" + (", then the task" if task else "")


def _links(links: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How near links come to their targets on texts that they were not trained on: means over the seeds."""
    judged = [one for one in links if "held out" in one]
    if not judged:
        return
    names = list(dict.fromkeys(name for one in judged for texts in one["held out"].values() for name in texts))
    yield f"\n| links | seeds | held-out texts | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}"
    for kind in dict.fromkeys(kind_of(one["links"]) for one in judged):
        found = [one["held out"] for one in judged if kind_of(one["links"]) == kind]
        for texts in found[0]:
            values = ([one[texts][name] for one in found if name in one[texts]] for name in names)
            cells = [f"{statistics.fmean(of_name):.2f}" if of_name else "" for of_name in values]
            yield f"| {kind} | {len(found)} | {texts} | {' | '.join(cells)} |"


def _outer(links: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What outer stages did to the loss on the questions that they chose their best step by."""
    found = [one for one in links if "validation" in one]
    if found:
        yield "\n| links | steps | questions | validation loss: before, and at each third |\n|---|---|---|---|"
    for one in found:
        losses = ", ".join(f"{loss:.2f}" for loss in one["validation"])
        yield f"| {one['links']} | {one['steps']} | {one['questions']} | {losses} |"


def _accuracies(rows: Sequence[Row]) -> Iterator[str]:
    """A line per message; differences are to texts of 8 and of 32 tokens on the same questions."""
    if not rows:
        return
    heads = ["message", "links", "seeds", "questions", "accuracy", *HALVES, "NLL"]
    heads += ["Δ accuracy to text, 8", "Δ accuracy to text, 32", "Δ NLL to text, 8"]
    yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for row in rows:
        texts = {
            tokens: next((one for one in rows if one.message.startswith(f"text, {tokens} ") and _same(one, row)), None)
            for tokens in (8, 32)
        }
        right, nll = row.values("correct"), row.values("nll")
        share, low, high = interval(right)
        halves = [""] * len(HALVES)
        if task_of(row.audits[0]) == NOTES:
            parts = [[one[place :: len(HALVES)] for one in right] for place in range(len(HALVES))]
            halves = [f"{mean(half):.2f}" for half in parts]
        cells = [row.message, row.links, str(len(right)), str(row.questions), f"{share:.2f} [{low:.2f}, {high:.2f}]"]
        cells += [*halves, f"{mean(nll):.2f}"]
        for tokens, kind in ((8, "correct"), (32, "correct"), (8, "nll")):
            text = texts[tokens]
            cells.append("" if text is None or text.message == row.message else difference(text, row, kind))
        yield f"| {' | '.join(cells)} |"


def _halves(rows: Sequence[Row]) -> Iterator[str]:
    """Latents beside shuffled ones, and beside texts of 8 tokens on each half of names and values."""
    found = []
    for row in rows:
        same = [one for one in rows if _same(one, row)]
        text = next((one for one in same if one.message.startswith("text, 8 ")), None)
        shuffled = f"shuffled{row.message.removeprefix('latents')}"
        other = next((one for one in same if one.message == shuffled and one.links == row.links), None)
        if row.message.startswith("latents") and text is not None and other is not None:
            parts = [""] * len(HALVES)
            if task_of(row.audits[0]) == NOTES:
                parts = [difference(text.half(place), row.half(place), "correct") for place in range(len(HALVES))]
            cells = [row.message, row.links, str(row.questions), difference(other, row, "correct"), *parts]
            found.append(f"| {' | '.join(cells)} |")
    if found:
        heads = ["message", "links", "questions", "Δ accuracy to shuffled", *(f"{half}: to text, 8" for half in HALVES)]
        yield "\n".join([f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", *found])


def difference(first: Row, second: Row, kind: str) -> str:
    """Second minus first, question by question, with its 97.5 % interval, and McNemar's p of single runs."""
    found = gap(first, second, kind)
    p = "" if found.p is None else f", p = {found.p:.2g}"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{p}"


def gap(first: Row, second: Row, kind: str) -> Difference:
    """That difference. A single run is compared with every seed of the other."""
    before, after = first.values(kind), second.values(kind)
    if kind == "nll" and len(before) == len(after) == 1:
        return paired_means(before[0], after[0], 0)
    return change(before, after)


def _seeds(rows: Sequence[Row]) -> Iterator[str]:
    """Seed by seed, for those lines that have several."""
    several = [row for row in rows if len(row.audits) > 1]
    if not several:
        return
    yield "\n| message | links | accuracy by seed | NLL by seed |\n|---|---|---|---|"
    for row in several:
        shares, costs = (
            ", ".join(f"{statistics.fmean(one):.2f}" for one in row.values(kind)) for kind in ("correct", "nll")
        )
        yield f"| {row.message} | {row.links} | {shares} | {costs} |"


def mean(values: Sequence[Sequence[float]]) -> float:
    """Over seeds and questions."""
    return statistics.fmean(map(statistics.fmean, values))


def _same(one: Row, other: Row) -> bool:
    asked = [(row.questions, row.audits[0]["hops"], task_of(row.audits[0])) for row in (one, other)]
    return asked[0] == asked[1]


def _order(row: Row) -> tuple[Any, ...]:
    first = row.audits[0]
    kinds = ("text", "trained")
    place = kinds.index(first["arm"]) if first["arm"] in kinds else 2
    what = first["arm"], first["tokens"], first["steps"]
    return (
        task_of(first) != NOTES,
        task_of(first),
        first["hops"],
        -row.questions,
        place,
        len(row.links),
        row.links,
        *what,
    )


def _name(arm: str, steps: int, tokens: int, hops: int, task: str) -> str:
    more = ("" if hops == 1 else f", {hops} hops") + ("" if task == NOTES else f", {task}")
    if arm == "text":
        return f"text, {tokens} tokens{more}"
    return (f"latents, m = {steps}" if arm == "trained" else arm if not steps else f"{arm}, m = {steps}") + more


def _times(times: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Turns, and what is left of them without their first position: the message behind the reading of the notes."""
    if not times:
        return
    heads = ["dtype", "questions at once", "message", "tokens written", "seconds per question", "reader's turn"]
    heads += ["of text's turn", "without its first position", "of text's"]
    yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for one in times:
        alike = [other for other in times if all(other[name] == one[name] for name in ("batch", "dtype"))]
        same = {other["way"]: other["reader seconds"] for other in alike}
        whole = f"{one['seconds']:.2f} [{one['range'][0]:.2f}, {one['range'][1]:.2f}]"
        turn = f"{one['reader seconds']:.2f} [{one['reader range'][0]:.2f}, {one['reader range'][1]:.2f}]"
        ratio = f"{one['reader seconds'] / same['text, 32 tokens']:.2f}"
        alone = ["", ""]
        if "text, 1 token" in same:
            base = same["text, 1 token" if one["way"].startswith("text") else "latents, m = 1"]
            rest, whole_text = one["reader seconds"] - base, same["text, 32 tokens"] - same["text, 1 token"]
            alone = [f"{rest:.2f}", f"{rest / whole_text:.2f}"]
        cells = [one["dtype"], str(one["batch"]), one["way"], f"{one['tokens']:.0f}", whole, turn, ratio, *alone]
        yield f"| {' | '.join(cells)} |"
