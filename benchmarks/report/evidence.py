"""What records without times say of the paper's claims: of random channels, and of audits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import relay as lab
from benchmarks.report.claims import FAILS, HOLDS, Finding, verdict_of
from benchmarks.report.tables import number


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
        judge: what the record says.
    """

    text: str
    source: str
    record: str
    where: str
    judge: Callable[[Any], Finding]


_CHANNELS = "jacobians.json", "`python -m benchmarks.jacobians`"
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
    Statement(
        "Latents of released models, before outer training, carry what their text carries.",
        "Table 2, accuracy",
        "trio.json",
        "[evidence.md](evidence.md)",
        lambda record: notes(record["qwen-smollm2"]["audit"]),
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
