"""``python -m benchmarks.relay STEP RECORD``: the paper's claims on the shipped relay lab, one step each.

Each step writes the JSON file RECORD, from which ``python -m benchmarks.report`` draws the verdict:

    table2     accuracy, seconds and tokens in 1, 2 and 3 rounds, latents against text (Table 2); a quiet machine
    steps      accuracy and seconds over latent steps, 0 to 112 (Table 9)
    loop       the solver looped by itself in 1, 2 and 3 passes, beside the system (LoopLM of Table 3)
    auto       accuracy and cost where each question ends its rounds by itself (--settle of recmas run); a quiet machine
    depth      links trained in 1, 2 and 3 rounds, each asked in 1, 2 and 3 (Figure 1); a link seed per call with
               --link-seed, which adds to RECORD
    ablations  links of 1, 2 and 3 layers, with and without a residual (Table 4); a link seed per call, too, or some
               of its kinds of links with --links
    gradients  gains of a round's Jacobian through the frozen agents, by kind of link (Theorem 4.1)

The first four ask systems as they are: the shipped one, and with --labs others of its agents with links of other seeds,
which `recmas lab build LAB --agents examples/relay --link-seed SEED` makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from benchmarks.harness.command import exit_code
from benchmarks.harness.machine import origin
from benchmarks.relay import ablations, auto, depth, gradients, labs, loop, stages, steps, table2
from benchmarks.relay.asked import RELAY
from recmas.files import write_atomically

DEFAULTS = {
    **{"table2": 512, "steps": 256, "depth": 256, "ablations": 256},
    **{"loop": 512, "auto": 256, "gradients": 32},
}
"""Questions of each step."""
SEEDED = ("depth", "ablations")
"""Steps that train links, of one seed per call."""


def write(path: Path, head: dict[str, Any], cells: Sequence[dict[str, Any]]) -> None:
    """A record: what it was made with, and a line per cell."""
    lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in cells)
    head = {"made": origin(), **head}
    write_atomically(path, json.dumps(head, indent=1)[:-2] + ',\n "cells": [\n' + lines + "\n]}\n")


def run(options: argparse.Namespace) -> None:
    count = options.questions or DEFAULTS[options.step]
    given = [RELAY, *options.labs]
    made: dict[str, Callable[[], labs.Measured]] = {
        "table2": lambda: labs.each(given, lambda system: table2.measure(system, count, options.turns)),
        "steps": lambda: labs.each(given, lambda system: steps.measure(system, count)),
        "loop": lambda: labs.each(given, lambda system: loop.measure(system, count)),
        "auto": lambda: labs.each(given, lambda system: auto.measure(system, count, options.turns, options.split)),
        "gradients": lambda: gradients.measure(count),
        "depth": lambda: depth.measure(count, options.link_seed, options.scale),
        "ablations": lambda: ablations.measure(count, options.link_seed, options.scale, options.links),
    }

    def earlier() -> list[dict[str, Any]]:
        """Cells of the record."""
        if options.step not in SEEDED or not options.record.exists():
            return []
        record = json.loads(options.record.read_text(encoding="utf-8"))
        stages.check_same(record, count, options.scale)
        return list(record["cells"])

    earlier()  # a record of other settings is refused before anything is trained
    head, cells = made[options.step]()
    new = {_of(cell) for cell in cells}
    write(options.record, head, [*(cell for cell in earlier() if _of(cell) not in new), *cells])


def _of(cell: dict[str, Any]) -> tuple[int | None, str | None]:
    """Cells of one seed and kind of links are made anew together."""
    return cell.get("link_seed"), cell.get("links")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=tuple(DEFAULTS))
    parser.add_argument("record", type=Path)
    parser.add_argument("--questions", type=int, help=f"default: {DEFAULTS}")
    parser.add_argument("--labs", type=Path, nargs="+", default=[], help="of the first four: other labs to ask, too")
    parser.add_argument("--turns", type=int, default=5, help="of table2 and auto: how often each way is timed")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of auto")
    parser.add_argument("--link-seed", type=int, default=1, help="of depth and ablations")
    parser.add_argument("--scale", type=float, default=1.0, help="of these: share of the training steps, for a trial")
    parser.add_argument(
        "--links",
        type=lambda text: text.split(","),
        default=[*ablations.KINDS],
        help=f"of ablations: kinds, with commas between them; default: {','.join(ablations.KINDS)}",
    )
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
