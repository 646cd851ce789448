"""``python -m benchmarks.trio.demo MODELS``: shipped links between released models, on fresh questions of the task.

The same questions are answered through latents, through texts, through the latents of another question, and without
any message. MODELS is a folder with the models that ``examples/trio/README.md`` names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.command import exit_code
from benchmarks.trio.__main__ import load_agents
from benchmarks.trio.cells import BATCH, METRIC
from benchmarks.trio.links import load_links
from benchmarks.trio.shipped import models_of
from recmas.evaluation import Audit, audit
from recmas.evaluation.audits import LEAST
from recmas.evaluation.paired import Difference, paired_means, paired_shares
from recmas.lab.notes import HALVES, questions

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trio"
SEED = 3
"""Of the questions: neither those that settings were chosen on nor those that the evidence reports."""
NAMES = {"trained": "latents", "text": "text", "shuffled": "shuffled", "no latents": "none"}


def demo(options: argparse.Namespace) -> None:
    if options.questions < LEAST:
        raise ValueError(f"--questions: {options.questions} are too few, {LEAST} are the least that show anything")
    started = time.perf_counter()
    names = models_of(options.models, options.links, options.any_weights)
    system = load_links(load_agents(options.models, names["reader"], names["solver"]), options.links)
    system.settings["reader"].decoding.max_new_tokens = options.tokens
    print(f"{names['reader']} reads, {names['solver']} solves: {options.questions} questions of seed {options.seed}")
    print(f"m = {options.latents} latents, texts of {options.tokens} tokens; loaded in {_since(started)}\n", flush=True)
    found = audit(
        system,
        questions("test", options.seed, options.questions),
        metric=METRIC,
        latent_steps=options.latents,
        batch_size=BATCH,
        arms=("text", "no latents"),
    )
    print(table(found))
    print(f"\nVerdict: {found.verdict} ({found.reason}).\n{against_text(found)}\n{_since(started)} in all")


def table(found: Audit) -> str:
    """A line per arm."""
    lines = [f"{'message':<10}{'accuracy':>22}{HALVES[0]:>9}{HALVES[1]:>9}{'NLL':>7}{'s/question':>12}"]
    arms = {one.arm: one for one in found.arms}
    for arm, name in NAMES.items():
        one = arms[arm]
        right = [outcome.correct for outcome in one.outcomes]
        share = f"{one.accuracy.value:.2f} [{one.accuracy.low:.2f}, {one.accuracy.high:.2f}]"
        halves = (right[place :: len(HALVES)] for place in range(len(HALVES)))
        known, unknown = (f"{sum(half) / len(half):.2f}" for half in halves)
        lines.append(f"{name:<10}{share:>22}{known:>9}{unknown:>9}{one.nll:>7.2f}{one.seconds:>12.2f}")
    return "\n".join(lines)


def against_text(found: Audit) -> str:
    """Whether texts answer more of these questions than latents, in words."""
    first, second = (next(one.outcomes for one in found.arms if one.arm == arm) for arm in ("trained", "text"))
    decision = paired_shares([one.correct for one in first], [one.correct for one in second])
    cost = paired_means([one.nll for one in first], [one.nll for one in second], 0)
    numbers = f"{_words(decision)} in accuracy, {_words(cost)} nats"
    if decision.shown:
        return f"Text answers {'more' if decision.value > 0 else 'fewer'} of them than latents: {numbers}."
    return f"Whether text answers more of them than latents cannot be told with so few: {numbers}."


def _words(one: Difference) -> str:
    return f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trio.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("--links", type=Path, default=EXAMPLE, help="folder of shipped links")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=SEED, help="of the questions")
    parser.add_argument("--latents", type=int, default=8, help="latent steps")
    parser.add_argument("--tokens", type=int, default=8, help="of a text message")
    parser.add_argument("--any-weights", action="store_true", help="take models of other weights than the links' own")
    options = parser.parse_args(arguments)
    return exit_code(lambda: demo(options))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
