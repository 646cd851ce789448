"""``python -m benchmarks.trio MODELS RECORD STEP READER SOLVER``: real models on the notes task.

MODELS is a folder with a model folder per name, such as MODELS/qwen. Each step adds to the JSON file RECORD, and goes
on where an earlier call stopped. Links are named by their word lists and seed, such as 1600-0:

    links   general links READER -> SOLVER of --lists and --seed, into MODELS/links/READER-SOLVER/LISTS-SEED
    task    a short outer stage from the links --links, into LISTS-SEED-task beside them
    audit   those links at --latents and --tokens, with --arms beside the trained and the shuffled one; --links may be
            several names with commas between them, which cost less than one by one: the notes are read once
    time    text and latent turns by turns, --at-once questions in a batch; run it on a quiet machine
    page    no models: print the record's tables as Markdown
    ship    the links --links in bfloat16, with their record, into --out
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.command import exit_code
from benchmarks.trio import frontier, record
from benchmarks.trio.cells import TEST, VALIDATION, measure
from benchmarks.trio.links import NOTES, load_links, save_links, train_links
from benchmarks.trio.page import rows_of, tables
from benchmarks.trio.rereading import Rereader
from benchmarks.trio.shipped import ship
from benchmarks.trio.task import train_task
from benchmarks.trio.times import FLOAT32, turns
from recmas import Agent
from recmas.lab.gym import TASKS

TASK = "-task"
DTYPES = {FLOAT32: torch.float32, "bfloat16": torch.bfloat16}
TIMED = 12
"""Questions whose turns are timed."""


def load_agents(
    models: Path, reader: str, solver: str, kind: type[Agent] = Agent, dtype: torch.dtype = torch.float32
) -> dict[str, Agent]:
    """The agents by role, of this kind; two roles of one model share it."""
    for name in (reader, solver):
        if not (models / name / "config.json").is_file():
            raise ValueError(f"{models / name}: no model there")
    made = {name: kind.from_pretrained(models / name, dtype, name=name) for name in {reader, solver}}
    return {"reader": made[reader], "solver": made[solver]}


def run(options: argparse.Namespace) -> None:
    pair = f"{options.reader}-{options.solver}"
    home = options.models / "links" / pair
    mine = record.part(record.read(options.record), pair)
    if options.step == "page":
        if not any(mine.values()):
            raise ValueError(f"{options.record}: nothing of {pair}")
        print("\n".join([tables(pair, mine), *frontier.table(rows_of(mine), mine["time"])]))
        return
    kind = Agent if options.step == "time" else Rereader
    dtype = DTYPES[options.dtype if options.step == "time" else FLOAT32]
    agents = load_agents(options.models, options.reader, options.solver, kind, dtype)
    if options.step == "links":
        name = f"{options.lists}-{options.seed}"
        system, found = train_links(agents, options.seed, options.lists, options.steps or 400, home / "pairs")
        save_links(system, home / name)
        checked = {one: Checkpoint(options.models / one).sha256 for one in (options.reader, options.solver)}
        note(options, pair, "links", [{"links": name, **found}], {"sha256": checked})
        return
    if options.step == "audit":
        for links in options.links.split(","):
            audited(options, pair, agents, links)
        return
    system = load_links(agents, home / options.links)
    if options.step == "ship":
        (entry,) = (one for one in mine["links"] if one["links"] == options.links)
        ship(system, options.out, {name: mine["sha256"][name] for name in (options.reader, options.solver)}, entry)
    elif options.step == "task":
        seed, latents = int(options.links.split("-")[1]), options.latents
        found = train_task(system, seed, options.steps or 30, latents, options.rate, home / "pairs")
        save_links(system, home / (options.links + TASK))
        note(options, pair, "links", [{"links": options.links + TASK, **found}])
    else:
        found = turns(system, TIMED, options.at_once, options.rounds)
        note(options, pair, "time", [{**one, "dtype": options.dtype} for one in found])


def audited(options: argparse.Namespace, pair: str, agents: dict[str, Agent], links: str) -> None:
    """Ask through the links of this name what the record has no answers to yet."""
    drawn = VALIDATION if options.validation else TEST
    kinds = f"m={options.latents}, text={options.tokens}, {options.arms}; {options.hops} hops"
    kinds += "" if options.task == NOTES else f" of {options.task}"
    cell = f"{links}: {kinds}, {options.questions} questions of seed {drawn}"
    if any(one["cell"] == cell for one in record.part(record.read(options.record), pair)["audit"]):
        print(f"{cell}: done before")
        return
    system = load_links(agents, options.models / "links" / pair / links, options.task)
    arms, count = [name for name in options.arms.split(",") if name], options.questions
    found = measure(system, count, options.hops, options.latents, options.tokens, arms, drawn, options.task)
    said = {"cell": cell, "links": links, "seed": drawn}
    note(options, pair, "audit", [said | one for one in found])
    print(cell, {one["arm"]: sum(one["correct"]) / len(one["correct"]) for one in found}, flush=True)


def note(options: argparse.Namespace, pair: str, kind: str, found: Sequence[dict[str, Any]], more: Any = None) -> None:
    """Add entries to the pair's part of the record; links of a name, and times of a batch and dtype, replace others."""
    commit = record.commit()

    def made(mine: dict[str, Any]) -> None:
        names = {"links": ("links",), "time": ("batch", "dtype")}.get(kind, ())
        new = [[one[name] for name in names] for one in found]
        kept = [one for one in mine[kind] if not names or [one[name] for name in names] not in new]
        mine.update(more or {}, **{kind: [*kept, *({**one, "commit": commit} for one in found)]})

    record.change(options.record, pair, made)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trio", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("step", choices=("links", "task", "audit", "time", "page", "ship"))
    parser.add_argument("reader")
    parser.add_argument("solver")
    parser.add_argument("--seed", type=int, default=0, help="of the links")
    parser.add_argument("--lists", type=int, default=1600, help="word lists to train on")
    parser.add_argument("--steps", type=int, help="of each link (default: 400), or of the outer stage (default: 30)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the outer stage")
    parser.add_argument("--links", default="1600-0", help="name of links that are there, or names of an audit's")
    parser.add_argument("--latents", type=int, default=8, help="latent steps")
    parser.add_argument("--tokens", type=int, default=32, help="of a text message")
    parser.add_argument("--arms", default="", help="such as text,identity,random,noise,zeros")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument(
        "--task", choices=(NOTES, *TASKS), default=NOTES, help="of an audit; others need the [gym] extra"
    )
    parser.add_argument("--validation", action="store_true", help="ask the questions that settings are chosen on")
    parser.add_argument("--out", type=Path, default=Path("examples/trio"), help="folder of shipped links")
    parser.add_argument("--at-once", type=int, default=1, choices=range(1, TIMED + 1), help="of the timed questions")
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed")
    parser.add_argument("--dtype", choices=DTYPES, default=FLOAT32, help="of the models that are timed")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
