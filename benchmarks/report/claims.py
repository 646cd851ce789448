"""What is claimed, by the paper and by this library, and how a verdict follows from stored records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tables import Record, duration, number

HOLDS, FAILS = "holds", "**does not hold**"
FILES = {"inner": "inner_training"}
"""Of suites whose file of cells has another name."""


@dataclass(frozen=True)
class Finding:
    """What the records say of a claim: numbers in words, and the verdict."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A statement that records of one suite decide.

    Attributes:
        text: the statement.
        source: where the paper (arXiv 2604.25917) makes it; empty for this library's own.
        suite: whose records decide it.
        judge: these records to what they say; None if none of them is about it.
    """

    text: str
    source: str
    suite: str
    judge: Callable[[Sequence[Record]], Finding | None]

    @property
    def command(self) -> str:
        """That measures it anew."""
        return f"pytest benchmarks/suites/cpu/test_bench_{FILES.get(self.suite, self.suite)}.py --grid full"


def _verdict(hold: Sequence[bool]) -> str:
    if all(hold):
        return HOLDS
    return FAILS if not any(hold) else f"**in part**: {sum(hold)} of {len(hold)}"


def _growth(op: str, shape: str) -> Callable[[Sequence[Record]], Finding | None]:
    """Of the fits of these times."""

    def judge(records: Sequence[Record]) -> Finding | None:
        found = [record for record in records if record["op"].endswith(op) and record["shape"] == shape]
        if not found:
            return None
        words = []
        for record in found:
            fit, first, last = record["fit"], record["seconds"][0], record["seconds"][-1]
            grows = (
                f"{duration(first * 1e6)} to {duration(last * 1e6)} from {record['sizes'][0]} to {record['sizes'][-1]}"
            )
            exponent = "" if fit is None else f", exponent {fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
            words.append(f"{record['op']}: {grows}{exponent}")
        return Finding("; ".join(words), _verdict([not record["missed"] for record in found]))

    return judge


def _whole(records: Sequence[Record]) -> Finding | None:
    found = [record for record in records if "turns" in record]
    if not found:
        return None
    words = f"R² {found[0]['r2']:.4f} over {2 * len(found[0]['turns'])} turns, at least 0.995 wanted"
    return Finding(words, _verdict([not record["missed"] for record in found]))


def _goals(records: Sequence[Record]) -> Finding | None:
    """Of the speed-ups over the peer of each goal."""
    found = [record for record in records if record["goal"] is not None]
    if not found:
        return None
    peers = {record["goal"]["peer"]: None for record in found}
    words = []
    for peer in peers:
        of_peer = [record for record in found if record["goal"]["peer"] == peer]
        ratios = [record["ratios"][peer]["value"] for record in of_peer if peer in record["ratios"]]
        span = "no times" if not ratios else f"{min(ratios):.2f}×" if len(ratios) == 1 else _span(ratios)
        words.append(f"{span} of {peer} in {len(of_peer)} {'cell' if len(of_peer) == 1 else 'cells'}")
    words += [f"{record['op']}: {record['missed']}" for record in found if record["missed"]]
    return Finding("; ".join(words), _verdict([not record["missed"] for record in found]))


def _span(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}× to {max(ratios):.2f}×"


def _cheaper(records: Sequence[Record]) -> Finding | None:
    """Whether a step of links takes less time and less memory than the same step of each other way to train."""
    words, hold = [], []
    for record in records:
        for peer in ("LoRA, rank 16", "full fine-tuning"):
            if peer not in record["ratios"]:
                continue
            ratio = record["ratios"][peer]
            memory = record["impls"][peer]["peak_mem_mb"] / record["impls"]["fused"]["peak_mem_mb"]
            words.append(f"{record['op']}: {ratio['value']:.2f}× faster, {number(memory)}× less memory than {peer}")
            hold.append(ratio["low"] > 1 and memory > 1)
    return Finding("; ".join(words), _verdict(hold)) if words else None


CLAIMS = (
    Claim(
        "A text step takes time in proportion to the vocabulary.",
        "Prop. 3.1",
        "complexity",
        _growth("text step", "over |V|"),
    ),
    Claim(
        "A text step takes time in proportion to the width.", "Prop. 3.1", "complexity", _growth("text step", "over d")
    ),
    Claim("A link takes time as the square of the width.", "Prop. 3.1", "complexity", _growth("links", "over d")),
    Claim(
        "A latent turn's time does not depend on the vocabulary.",
        "Prop. 3.1",
        "complexity",
        _growth("latent turn", "over |V|"),
    ),
    Claim(
        "A turn of m steps takes time in proportion to m, latent or text.",
        "Prop. 3.1",
        "complexity",
        _growth(" turn", "over m"),
    ),
    Claim("The terms of Prop. 3.1 explain the time of whole turns.", "Prop. 3.1", "complexity", _whole),
    Claim("A latent handoff is faster than a handoff in text.", "Table 2, time", "handoff", _goals),
    Claim("A link costs less to train than LoRA and full fine-tuning.", "Table 5", "costs", _cheaper),
    Claim(
        "The reference algorithm's rollout does take longer, the larger the vocabulary (negative control).",
        "",
        "complexity",
        _growth("reference algorithm's rollout", "over |V|"),
    ),
    Claim("A link is never slower than its plain module in torch, and faster as stated.", "", "link", _goals),
    Claim("A call costs little beside its arithmetic.", "", "overhead", _goals),
    Claim("The alignment loss is at least 5 times as fast as in plain torch.", "", "alignment", _goals),
    Claim("Steps of an agent are faster than its plain model's and its peers', as stated.", "", "frozen", _goals),
    Claim("A latent rollout is at least 15 times as fast as the reference algorithm's.", "", "rollout", _goals),
    Claim("A whole answer is faster than by the reference algorithm, as stated.", "", "system", _goals),
    Claim(
        "A step of outer training takes 0.45 of the reference algorithm's time and half its memory, or less.",
        "",
        "training",
        _goals,
    ),
    Claim("Inner training reads each text once, and so is at least 10 times as fast.", "", "inner", _goals),
    Claim("Two processes train at least 1.7 times as fast as one.", "", "processes", _goals),
    Claim("Processes on Ray keep 0.87 of one process's speed, or more.", "", "cluster", _goals),
)
UNMEASURED = (
    ("Gradients keep their norm through links and the frozen models between them.", "Theorem 4.1"),
    ("Accuracies on public benchmarks, and their growth with rounds.", "Tables 2 and 3, Figure 1"),
    ("Two layers with a residual connection are the best link.", "Table 4"),
    ("Distillation, mixture and deliberation beat their best agent.", "Tables 6 to 8"),
    ("Accuracy grows with the number of latent steps up to about 80.", "Table 9"),
)
"""What nothing here has measured yet."""


def relay(record: dict[str, Any]) -> Finding:
    """Whether the relay lab's latents carry what its questions need."""
    right = {arm["arm"]: sum(arm["correct"]) / len(arm["correct"]) for arm in record["arms"]}
    controls = ", ".join(f"{name} {share:.3f}" for name, share in right.items() if name not in ("trained", "text"))
    shares = f"latents {right['trained']:.3f}, text {right['text']:.3f}; {controls}"
    words = f"{record['questions']['count']} questions: {shares}"
    return Finding(words, HOLDS if record["verdict"] == "content matters" else FAILS)


def notes(audits: Sequence[dict[str, Any]]) -> Finding:
    """Whether latents of released models answer as well as their text of 32 tokens, before any outer training."""
    rows = [one for one in audits if one["hops"] == 1]
    text = next(one["correct"] for one in rows if one["arm"] == "text" and one["tokens"] == 32)
    best = max((one for one in rows if one["arm"] == "trained"), key=lambda one: sum(one["correct"]))
    shares = [sum(correct) / len(correct) for correct in (best["correct"], text)]
    words = f"{len(text)} questions: latents {shares[0]:.2f} at m = {best['steps']}, text of 32 tokens {shares[1]:.2f}"
    return Finding(words, HOLDS if shares[0] >= shares[1] else FAILS)


def text_channels(record: dict[str, Any]) -> Finding:
    """Whether the norm of a text channel's Jacobian is bounded by a multiple of the entropy, the same at all widths."""
    ratios: dict[float, list[float]] = {}
    for cell in record["text"]:
        ratios.setdefault(cell["entropy"], []).extend(norm / cell["entropy"] for norm in cell["norms"])
    words = ", ".join(f"{number(max(found))} at {entropy:g}" for entropy, found in ratios.items())
    most = [max(found) for _, found in sorted(ratios.items())]
    # O(entropy) is about small ones: there the bound must not grow.
    return Finding(f"largest norm over entropy, by entropy in nats: {words}", _verdict([most[0] <= 2 * max(most[1:])]))


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
        hold.append(exponent <= -0.4)
    return Finding("; ".join(words), _verdict(hold))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _slope(first: float, last: float, at_first: float, at_last: float) -> float:
    return math.log(at_last / at_first) / math.log(last / first)
