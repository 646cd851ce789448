"""The tables of a record, as Markdown: accuracies by half with intervals, paired with texts, links, and times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from recmas.evaluation import wilson
from recmas.evaluation.paired import paired_means, paired_shares
from recmas.lab.notes import HALVES


def tables(pair: str, record: dict[str, Any]) -> str:
    """All of one pair of models."""
    parts = [f"### {pair.replace('-', ' → ')}", *_links(record["links"]), *_audits(record["audit"])]
    return "\n".join([*parts, *_times(record["time"])])


def _links(links: dict[str, Any]) -> Iterator[str]:
    if not links:
        return
    names = list(next(iter(links["held out"].values())))
    yield f"\n| held-out texts | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    for kind, found in links["held out"].items():
        yield f"| {kind} | {' | '.join(f'{found[name]:.2f}' for name in names)} |"


def _audits(audits: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line per arm; differences are to the text of 32 tokens on the same questions."""
    if not audits:
        return
    rows = {(one["arm"], one["steps"], one["tokens"], one["hops"]): one for one in audits}
    heads = ["message", "questions", "accuracy", *HALVES, "NLL", "Δ accuracy to text, 32", "Δ NLL to text, 32"]
    yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for (arm, steps, tokens, hops), one in sorted(rows.items(), key=lambda item: (item[0][3], _order(item[1]))):
        right, nll = one["correct"], one["nll"]
        low, high = wilson(sum(right), len(right))
        halves = [_share(right[place :: len(HALVES)]) for place in range(len(HALVES))]
        text = rows.get(("text", 0, 32, hops))
        compared = ["", ""]
        if text is not None and text is not one and len(text["correct"]) == len(right):
            decision, cost = paired_shares(text["correct"], right), paired_means(text["nll"], nll, 0)
            compared = [
                f"{decision.value:+.2f} [{decision.low:+.2f}, {decision.high:+.2f}], p = {decision.p:.2g}",
                f"{cost.value:+.2f} [{cost.low:+.2f}, {cost.high:+.2f}]",
            ]
        share = f"{_share(right)} [{low:.2f}, {high:.2f}]"
        cells = [_name(arm, steps, tokens), str(len(right)), share, *halves, f"{sum(nll) / len(nll):.2f}", *compared]
        yield f"| {' | '.join(cells)} |"


def _order(one: dict[str, Any]) -> tuple[int, str, int, int]:
    kinds = ("text", "trained")
    return kinds.index(one["arm"]) if one["arm"] in kinds else 2, one["arm"], one["tokens"], one["steps"]


def _name(arm: str, steps: int, tokens: int) -> str:
    if arm == "text":
        return f"text, {tokens} tokens"
    return f"latents, m = {steps}" if arm == "trained" else arm if not steps else f"{arm}, m = {steps}"


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right) / len(right):.2f}"


def _times(times: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not times:
        return
    yield "\n| questions at once | message | tokens written | seconds per question | reader's turn | of text's turn |"
    yield f"|{'---|' * 6}"
    for one in times:
        text = next(t for t in times if t["batch"] == one["batch"] and t["way"] == "text, 32 tokens")
        whole = f"{one['seconds']:.2f} [{one['range'][0]:.2f}, {one['range'][1]:.2f}]"
        turn = f"{one['reader seconds']:.2f} [{one['reader range'][0]:.2f}, {one['reader range'][1]:.2f}]"
        ratio = f"{one['reader seconds'] / text['reader seconds']:.2f}"
        at_once = min(one["batch"], one["questions"])
        yield f"| {at_once} | {one['way']} | {one['tokens']:.0f} | {whole} | {turn} | {ratio} |"
