"""What records without times say of the paper's claims: of random channels, and of audits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import lists
from benchmarks.report import relay as lab
from benchmarks.report.claims import FAILS, HOLDS, UNTOLD, Finding, verdict_of
from benchmarks.report.tables import number
from benchmarks.trio import frontier
from benchmarks.trio.cells import TEST
from benchmarks.trio.links import NOTES
from benchmarks.trio.page import Row, difference, gap, mean, pooled, rows_of, task_of
from benchmarks.trio.record import part
from recmas.evaluation.paired import paired_means, paired_shares


def relay(record: dict[str, Any]) -> Finding:
    """Whether the relay lab's latents carry what its questions need."""
    audits = record["audits"]
    right = {
        arms[0]["arm"]: mean([arm["correct"] for arm in arms])
        for arms in zip(*(one["arms"] for one in audits), strict=True)
    }
    controls = ", ".join(f"{name} {share:.3f}" for name, share in right.items() if name not in ("trained", "text"))
    shares = f"latents {right['trained']:.3f}, text {right['text']:.3f}; {controls}"
    words = f"{len(audits)} link seeds, {record['questions']['count']} questions: {shares}"
    return Finding(words, verdict_of([one["verdict"] == "content matters" for one in audits]))


MARGIN = 0.05
"""Of accuracy: latents that are less than this below text carry what it carries."""


def carried(pair: str, kind: str, hops: int = 1, task: str = NOTES) -> Callable[[dict[str, Any]], Finding | None]:
    """Whether latents answer as many questions as texts of equally many tokens, 8 of each.

    Args:
        pair: of models.
        kind: of links, as `benchmarks.trio.page.kind_of` names it.
        hops: of the questions.
        task: of the questions.
    """

    def judge(record: dict[str, Any]) -> Finding | None:
        rows = pooled(_asked(record, pair, hops, task))
        latents = next((row for row in rows if _sent(row, "trained", "steps") and row.links == kind), None)
        if latents is None:
            return None
        text = next(row for row in rows if _sent(row, "text", "tokens") and row.questions == latents.questions)
        before, after = (mean(row.values("correct")) for row in (text, latents))
        found = gap(text, latents, "correct")
        seeds = f"{len(latents.audits)} link seeds" if len(latents.audits) > 1 else "one link seed"
        shares = f"latents {after:.2f} at m = 8, text of 8 tokens {before:.2f}"
        words = f"{latents.questions} questions, {seeds}: {shares}; {difference(text, latents, 'correct')} (97.5 %)"
        worse = found.shown and found.value < 0  # as an audit decides
        return Finding(words, HOLDS if found.low > -MARGIN else FAILS if worse else UNTOLD)

    return judge


def _sent(row: Row, arm: str, unit: str) -> bool:
    """Whether the message is of this arm, and 8 long."""
    first = row.audits[0]
    return bool(first["arm"] == arm and first[unit] == 8)


def _asked(record: dict[str, Any], pair: str, hops: int, task: str) -> list[dict[str, Any]]:
    """Audits of the test's questions of one kind."""
    kinds = (TEST, hops, task)
    return [one for one in part(record, pair)["audit"] if (one["seed"], one["hops"], task_of(one)) == kinds]


def content(pair: str, hops: int = 1, task: str = NOTES) -> Callable[[dict[str, Any]], Finding | None]:
    """Whether latents of the right question do better than those of another one, by the rule of an audit.

    Args:
        pair: of models.
        hops: of the questions.
        task: of the questions.
    """

    def judge(record: dict[str, Any]) -> Finding | None:
        arms = {(one["cell"], one["arm"]): one for one in _asked(record, pair, hops, task)}
        hold, shares, costs, small = [], [], [], []
        for (cell, arm), one in arms.items():
            if arm == "trained":
                other = arms[cell, "shuffled"]
                share = paired_shares(other["correct"], one["correct"])
                cost = paired_means(other["nll"], one["nll"], 0)
                hold.append((share.shown and share.value > 0) or (cost.shown and cost.value < 0))
                small.append(share.within(MARGIN))
                shares.append(share.value)
                costs.append(cost.value)
        if not hold:
            return None
        spans = (f"{min(found):+.2f} to {max(found):+.2f}" for found in (shares, costs))
        words = (
            "accuracy minus that with latents of another question: {}, NLL of the gold answer: {} nats, in {} audits"
        )
        verdict = verdict_of(hold) if any(hold) or all(small) else UNTOLD
        return Finding(words.format(*spans, len(hold)), verdict)

    return judge


def half_the_time(record: dict[str, Any]) -> Finding | None:
    """Whether a latent turn of 8 steps takes half the time of a text turn of 32 tokens, or less."""
    turns = {(one["dtype"], one["batch"], one["way"]): one for one in part(record, "qwen-smollm2")["time"]}
    words, hold = [], []
    for dtype, batch in dict.fromkeys(key[:2] for key in turns):
        latent, text = (turns[dtype, batch, way] for way in ("latents, m = 8", "text, 32 tokens"))
        ratio = latent["reader seconds"] / text["reader seconds"]
        words.append(f"{ratio:.2f} with {batch} at once in {dtype}")
        hold.append(ratio <= 0.5)
    return (
        Finding(f"of the reader's text turn, reading included: {', '.join(words)}", verdict_of(hold)) if hold else None
    )


def on_the_frontier(record: dict[str, Any]) -> Finding | None:
    """Whether no text takes less time than latents do and is shown to answer more, for each number of latents."""
    mine = part(record, "qwen-smollm2")
    found = frontier.ways(rows_of(mine), mine["time"])
    words = []
    for at_once in dict.fromkeys(way.at_once for way in found):
        each = [
            f"{w.message} {mean(w.row.values('correct')):.2f} in {w.seconds:.2f} s"
            for w in found
            if w.at_once == at_once
        ]
        words.append(f"{at_once} at once: {', '.join(each)}")
    if not found:
        return None
    hold = [frontier.beaten(way, found) is None for way in found if way.latent]
    return Finding(f"{found[0].row.questions} questions, {'; '.join(words)}", verdict_of(hold))


SMALL = 0.3
"""The largest entropy, in nats, that counts as small: all output is nearly one token's."""
WITHIN = 0.1
"""How far an exponent may be from the theorem's, as in the claims about time."""


def text_channels(record: dict[str, Any]) -> Finding:
    """Whether the norm of a text channel's Jacobian falls with a small entropy at least in proportion to it."""
    norms: dict[float, float] = {}
    for cell in record["text"]:
        norms[cell["entropy"]] = max(norms.get(cell["entropy"], 0.0), *cell["norms"])
    words = ", ".join(f"{number(norm)} at {entropy:g}" for entropy, norm in norms.items())
    small = [entropy for entropy in norms if entropy <= SMALL]
    exponent = _slope(min(small), max(small), norms[min(small)], norms[max(small)])
    measured = f"largest norm by entropy in nats, at all widths: {words}; exponent up to {SMALL:g}: {exponent:.2f}"
    return Finding(measured, verdict_of([exponent >= 1 - WITHIN]))


def links_keep_gradients(record: dict[str, Any]) -> Finding:
    """Whether a link's Jacobian differs from norm 1 by less, the wider it is: as the root of its width."""
    hold, words = [], []
    for kind, name in (("norms", "largest singular value"), ("gains", "gain of a random direction")):
        off = {cell["d"]: _quantile([abs(norm - 1) for norm in cell[kind]], 0.9) for cell in record["links"]}
        spread = {cell["d"]: _quantile(cell[kind], 0.95) - _quantile(cell[kind], 0.05) for cell in record["links"]}
        least, most = min(off), max(off)
        exponent, of_spread = (_slope(least, most, each[least], each[most]) for each in (off, spread))
        ends = f"{off[least]:.3f} at d = {least} and {off[most]:.3f} at {most}"
        words.append(f"{name}: off 1 by {ends} in nine of ten draws, exponent {exponent:.2f} (spread {of_spread:.2f})")
        hold.append(exponent <= -0.5 + WITHIN)
    return Finding("; ".join(words), verdict_of(hold))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _slope(first: float, last: float, at_first: float, at_last: float) -> float:
    return math.log(at_last / at_first) / math.log(last / first)


@dataclass(frozen=True)
class Statement:
    """A claim that one record decides.

    Attributes:
        text: the claim.
        source: where the paper makes it.
        record: a file in ``benchmarks/results``.
        where: the command or the page that says how the record was made.
        judge: what the record says; None if it says nothing of this.
    """

    text: str
    source: str
    record: str
    where: str
    judge: Callable[[Any], Finding | None]


_CHANNELS = "jacobians.json", "`python -m benchmarks.jacobians`"
_NAMES = {"qwen": "Qwen2.5-Coder-0.5B", "smollm2": "SmolLM2-135M", "gemma": "Gemma-3-270M"}
_LINKS = (
    ("qwen", "smollm2", "1600 lists"),
    ("qwen", "smollm2", "1600 lists, then the task"),
    ("smollm2", "qwen", "800 lists"),
    ("gemma", "qwen", "400 lists"),
)
_OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("two hops, of which the solver knows one", {"hops": 2}),
    ("whose statement it is (needle_haystack of reasoning-gym)", {"task": "needle_haystack"}),
    ("how two people are related (family_relationships of reasoning-gym)", {"task": "family_relationships"}),
)
"""Questions that the first of these links are asked, too, zero-shot."""


def _trio(text: str, source: str, judge: Callable[[Any], Finding | None]) -> Statement:
    return Statement(text, source, "trio.json", "[evidence.md](evidence.md)", judge)


_TRIO = (
    *(
        _trio(
            f"Latents of {_NAMES[sender]} tell {_NAMES[receiver]} what texts of equal length tell; links: {kind}.",
            "Table 2, accuracy",
            carried(f"{sender}-{receiver}", kind),
        )
        for sender, receiver, kind in _LINKS
    ),
    *(
        _trio(
            f"Latents of {_NAMES['qwen']} tell {_NAMES['smollm2']} what texts of equal length tell; {what}.",
            "Table 2, accuracy",
            carried("qwen-smollm2", "1600 lists", **asked),
        )
        for what, asked in _OTHER
    ),
    *(
        _trio(
            f"What latents from {_NAMES[sender]} say to {_NAMES[receiver]} matters, not that there are some.",
            "Table 2, accuracy",
            content(f"{sender}-{receiver}"),
        )
        for sender, receiver in dict.fromkeys(pair[:2] for pair in _LINKS)
    ),
    *(
        _trio(
            f"What latents from {_NAMES['qwen']} say to {_NAMES['smollm2']} matters, not that there are some; {what}.",
            "Table 2, accuracy",
            content("qwen-smollm2", **asked),
        )
        for what, asked in _OTHER
    ),
    _trio(
        "No text is both faster than latents and more accurate (1, 8 and 32 steps, one and four questions at once).",
        "Table 2",
        on_the_frontier,
    ),
    _trio("A latent turn of 8 steps takes at most half of a text turn of 32 tokens.", "Table 2, time", half_the_time),
)
_LISTS = "lists.json", "[evidence.md](evidence.md#messages-of-twenty-tokens-a-lab-where-latents-should-win)"
STATEMENTS = (
    Statement("Gradients through text vanish with its entropy.", "Theorem 4.1", *_CHANNELS, text_channels),
    Statement(
        "Gradients through a link keep their norm, the better the wider it is.",
        "Theorem 4.1",
        *_CHANNELS,
        links_keep_gradients,
    ),
    Statement(
        "Latents carry what the receiver needs.",
        "Table 2, accuracy",
        "relay_audit.json",
        "[how-to/audit.md](how-to/audit.md)",
        relay,
    ),
    *_TRIO,
    Statement(
        "Latents of 20 steps answer what texts of 20 tokens answer, within a point, in agents made for such messages.",
        "Table 2, accuracy",
        *_LISTS,
        lists.as_accurate,
    ),
    Statement(
        "Latents of 20 steps take at most half of the time of texts of 20 tokens, with a vocabulary of 32,000.",
        "Table 2, time",
        *_LISTS,
        lists.half_the_time,
    ),
    *(
        Statement(
            text,
            source,
            f"relay_{step}.json",
            f"`python -m benchmarks.relay {step} benchmarks/results/relay_{step}.json`",
            judge,
        )
        for text, source, step, judge in lab.CLAIMS
    ),
)
