"""``python -m benchmarks.relay_audit RECORD [--page]``: the relay lab's audit, and the table of docs/how-to/audit.md.

It does what that page's two commands do, keeps what every arm made of every question in the JSON file RECORD, and
prints the table as Markdown. With --page it only prints, from what RECORD holds.
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
from recmas import RecursiveMAS
from recmas.evaluation import Outcome, audit
from recmas.evaluation.findings import HEADS, columns, summed
from recmas.files import write_atomically
from recmas.lab.world import questions

RELAY = Path(__file__).resolve().parents[1] / "examples" / "relay"
WORLDS = 2026
"""Seed of the questions, as of `recmas lab questions`."""
HOPS, ROUNDS = (1, 2, 3), 3
KEPT = ("rounds", "latent_steps", "seed", "metric", "verdict", "reason", "margin", "nll_margin")
DETECTABLE = ("detectable_accuracy", "detectable_accuracy_at_best", "detectable_nll")


def measure(count: int) -> dict[str, Any]:
    """The record of an audit of so many questions."""
    transformers.utils.logging.disable_progress_bar()
    rows = questions("test", WORLDS, HOPS, count)
    found = audit(RecursiveMAS.from_pretrained(RELAY), rows, metric="last_word", rounds=ROUNDS, progress=False)
    arms = [
        {
            "arm": one.arm,
            "changed": one.changed,
            "correct": [outcome.correct for outcome in one.outcomes],
            "nll": [round(outcome.nll, 4) for outcome in one.outcomes],
        }
        for one in found.arms
    ]
    return {
        "made": origin(),
        "questions": {"count": count, "seed": WORLDS, "hops": HOPS},
        **{name: getattr(found, name) for name in (*KEPT, *DETECTABLE)},
        "arms": arms,
    }


def page(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, computed from the kept outcomes, and of what stands below it."""
    heads = HEADS[:-1]  # without the times, which a busy machine spoils
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    trained: list[Outcome] | None = None
    for kept in record["arms"]:
        outcomes = [Outcome("", *one) for one in zip(kept["correct"], kept["nll"], strict=True)]
        one = replace(summed(kept["arm"], outcomes, trained, 0.0, record["seed"]), changed=kept["changed"])
        yield f"| {' | '.join(columns(one)[:-1])} |"
        trained = trained or outcomes
    accuracy, best, nll = (f"{record[name]:.3f}" for name in DETECTABLE)
    yield f"\nSmallest difference that shows: {accuracy} in accuracy ({best} if all changes go one way), {nll} nats."
    yield f"Verdict: {record['verdict']}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay_audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--page", action="store_true", help="only print, from what RECORD holds")
    parser.add_argument("--questions", type=int, default=512)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if not options.page:
        head = measure(options.questions)
        arms = ",\n".join(json.dumps(one, separators=(",", ":")) for one in head.pop("arms"))
        lines = json.dumps(head, indent=1)[:-2] + ',\n "arms": [\n' + arms + "\n]}\n"
        write_atomically(options.record, lines)
    print("\n".join(page(json.loads(options.record.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    sys.exit(main())
