"""``python -m benchmarks.trio MODELS RECORD STEP READER SOLVER``: real models on the notes task.

MODELS is a folder with a model folder per name, such as MODELS/qwen. Each step adds to the JSON file RECORD, and goes
on where an earlier call stopped:

    links   general links READER -> SOLVER, into MODELS/links/READER-SOLVER
    audit   the cells of `benchmarks.trio.cells`, as many as --seconds allow
    time    text and latent turns by turns; run it on a quiet machine
    page    no models: print the record's tables as Markdown
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.machine import origin
from benchmarks.trio.cells import CELLS, measure, turns
from benchmarks.trio.links import load_links, save_links, train_links
from benchmarks.trio.page import tables
from recmas import Agent
from recmas.files import write_atomically


def load_agents(models: Path, reader: str, solver: str) -> dict[str, Agent]:
    """The agents by role; two roles of one model share it."""
    for name in (reader, solver):
        if not (models / name / "config.json").is_file():
            raise ValueError(f"{models / name}: no model there")
    made = {name: Agent.from_pretrained(models / name, torch.float32, name=name) for name in {reader, solver}}
    return {"reader": made[reader], "solver": made[solver]}


def run(options: argparse.Namespace) -> None:
    models, pair = options.models, f"{options.reader}-{options.solver}"
    record: dict[str, Any] = json.loads(options.record.read_text()) if options.record.exists() else {}
    if options.step == "page":
        if pair not in record:
            raise ValueError(f"{options.record}: nothing of {pair}")
        print(tables(pair, record[pair]))
        return
    mine = record.setdefault(pair, {"links": {}, "audit": [], "time": []})
    home = models / "links" / pair
    if options.step != "links" and not (home / "outer").is_dir():
        raise ValueError(f"{home}: no links there; the step 'links' trains them")
    started = time.perf_counter()

    def note() -> None:
        record["made"] = origin()
        write_atomically(options.record, json.dumps(record, indent=1) + "\n")

    agents = load_agents(models, options.reader, options.solver)
    if options.step == "links":
        system, trained = train_links(agents, options.seed, options.lists, options.steps, home / "pairs")
        save_links(system, home)
        names = dict.fromkeys((options.reader, options.solver))
        mine["links"] = trained | {"sha256": {name: Checkpoint(models / name).sha256 for name in names}}
        note()
        return
    system = load_links(agents, home)
    if options.step == "time":
        mine["time"] = [one for batch in (1, 8) for one in turns(system, options.questions, batch, options.rounds)]
        note()
        return
    done = {one["cell"] for one in mine["audit"]}
    for cell in CELLS:
        name = f"{cell.name}; {options.hops} hops, {options.questions} questions"
        if name not in done and time.perf_counter() - started < options.seconds:
            found = measure(system, cell, options.questions, options.hops)
            mine["audit"] += [{"cell": name, **one} for one in found]
            note()
            print(name, {one["arm"]: sum(one["correct"]) / len(one["correct"]) for one in found}, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trio", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("step", choices=("links", "audit", "time", "page"))
    parser.add_argument("reader")
    parser.add_argument("solver")
    parser.add_argument("--seed", type=int, default=0, help="of the links and their texts")
    parser.add_argument("--lists", type=int, default=200, help="word lists to train on")
    parser.add_argument("--steps", type=int, default=400, help="of each link")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed")
    parser.add_argument("--seconds", type=float, default=600, help="no audit begins later than this")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
