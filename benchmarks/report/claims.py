"""What is claimed, by the paper and by this library, and how a verdict follows from stored records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness.names import FUSED
from benchmarks.report.tables import Record, duration, number

HOLDS, FAILS, UNTOLD = "holds", "**does not hold**", "**cannot be told**"
FILES = {"inner": "inner_training", "released": "frozen"}
"""Of suites whose file of cells has another name."""
NEEDS = {"released": "RECMAS_BENCH_MODELS=DIR "}
"""Before the command of a suite that needs more than this repository (benchmarks/README.md)."""


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
        file = f"benchmarks/suites/cpu/test_bench_{FILES.get(self.suite, self.suite)}.py"
        return f"{NEEDS.get(self.suite, '')}pytest {file} --grid full"


def verdict_of(hold: Sequence[bool]) -> str:
    """Of a claim in several cells."""
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
        return Finding("; ".join(words), verdict_of([not record["missed"] for record in found]))

    return judge


def _whole(records: Sequence[Record]) -> Finding | None:
    found = [record for record in records if "turns" in record]
    if not found:
        return None
    words = f"R² {found[0]['r2']:.4f} over {2 * len(found[0]['turns'])} turns, at least 0.995 wanted"
    return Finding(words, verdict_of([not record["missed"] for record in found]))


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
    return Finding("; ".join(words), verdict_of([not record["missed"] for record in found]))


FEW_ROWS, OF_READS = 4, 75


def _reads(records: Sequence[Record]) -> Finding | None:
    """Of the share of a bare read's speed that cells of few rows reach."""
    found = [
        (record["shape"], share)
        for record in records
        if record["tokens"] <= FEW_ROWS and (share := record["impls"][FUSED].get("read_ceiling_pct")) is not None
    ]
    if not found:
        return None
    words = []
    for shape in dict.fromkeys(shape for shape, _ in found):
        shares = [share for other, share in found if other == shape]
        words.append(f"{shape}: {min(shares):.0f} to {max(shares):.0f} % in {len(shares)} cells")
    return Finding("; ".join(words), verdict_of([share >= OF_READS for _, share in found]))


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
    return Finding("; ".join(words), verdict_of(hold)) if words else None


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
    Claim("Steps of up to 4 rows reach 75 % of the speed of a bare read of their weights.", "", "frozen", _reads),
    Claim("Steps of released models are faster than the plain model's and its peers'.", "", "released", _goals),
    Claim("Steps of up to 4 rows of released models reach these 75 %, too.", "", "released", _reads),
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
    Claim(
        "Processes on Ray keep 0.87 of one process's speed, and a pipeline of them gains 1.3, or more.",
        "",
        "cluster",
        _goals,
    ),
    Claim("A server answers 32 clients at least 3 times as fast as one by one.", "", "serving", _goals),
)
UNMEASURED = (
    ("Accuracies on public benchmarks.", "Tables 2, 3 and 9, Figure 1"),
    ("Distillation, mixture and deliberation beat their best agent.", "Tables 6 to 8"),
)
"""What nothing here has measured yet."""
