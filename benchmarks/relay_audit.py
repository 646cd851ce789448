"""``python -m benchmarks.relay_audit RECORD [--page]``: the relay lab's audit, and the table of docs/how-to/audit.md.

It does what that page's two commands do, keeps what every arm made of every question in the JSON file RECORD, and
prints the table as Markdown. With --page it only prints, from what RECORD holds. With --labs the same questions are
asked of other labs, too, of the same agents with links of other seeds; the table is the shipped one's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from benchmarks.harness.command import exit_code
from benchmarks.harness.machine import origin
from benchmarks.relay.asked import RELAY
from benchmarks.relay.labs import Measured, each
from recmas import RecursiveMAS
from recmas.evaluation import Outcome, audit
from recmas.evaluation.findings import HEADS, columns, summed
from recmas.files import write_atomically
from recmas.lab.world import questions

WORLDS = 2026
"""Seed of the questions, as of `recmas lab questions`."""
HOPS, ROUNDS = (1, 2, 3), 3
KEPT = ("rounds", "latent_steps", "seed", "metric", "verdict", "reason", "margin", "nll_margin")
DETECTABLE = ("detectable_accuracy", "detectable_accuracy_at_best", "detectable_nll")


def measure(system: RecursiveMAS, count: int) -> Measured:
    """What a record says of so many questions, and one audit."""
    rows = questions("test", WORLDS, HOPS, count)
    found = audit(system, rows, metric="last_word", rounds=ROUNDS, progress=False)
    arms = [
        {
            "arm": one.arm,
            "changed": one.changed,
            "correct": [outcome.correct for outcome in one.outcomes],
            "nll": [round(outcome.nll, 4) for outcome in one.outcomes],
        }
        for one in found.arms
    ]
    head = {"questions": {"count": count, "seed": WORLDS, "hops": HOPS}}
    return head, [{**{name: getattr(found, name) for name in (*KEPT, *DETECTABLE)}, "arms": arms}]


def page(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the first audit's table, computed from the kept outcomes, and of what stands below it."""
    first = record["audits"][0]
    heads = HEADS[:-1]  # without the times, which a busy machine spoils
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    trained: list[Outcome] | None = None
    for kept in first["arms"]:
        outcomes = [Outcome("", *one) for one in zip(kept["correct"], kept["nll"], strict=True)]
        one = replace(summed(kept["arm"], outcomes, trained, 0.0, first["seed"]), changed=kept["changed"])
        yield f"| {' | '.join(columns(one)[:-1])} |"
        trained = trained or outcomes
    accuracy, best, nll = (f"{first[name]:.3f}" for name in DETECTABLE)
    yield f"\nSmallest difference that shows: {accuracy} in accuracy ({best} if all changes go one way), {nll} nats."
    yield f"Verdict: {first['verdict']}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay_audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--page", action="store_true", help="only print, from what RECORD holds")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--labs", type=Path, nargs="+", default=[], help="other labs to audit, too")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if not options.page:
        transformers.utils.logging.disable_progress_bar()
        head, audits = each([RELAY, *options.labs], lambda system: measure(system, options.questions))
        lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in audits)
        whole = json.dumps({"made": origin(), **head}, indent=1)[:-2] + ',\n "audits": [\n' + lines + "\n]}\n"
        write_atomically(options.record, whole)
    print("\n".join(page(json.loads(options.record.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    sys.exit(main())
