"""``python -m benchmarks.lists RECORD answers LAB ...``, ``... times LAB``, ``... page``: where latents should win.

LABs are what ``recmas lab build LAB --task list`` wrote: messages of twenty tokens, vocabularies of 32,000. ``answers``
keeps which of the test's questions each LAB answers in text, in latents, and in latents of other questions. ``times``
keeps seconds per question, all ways by turns, and with them the text of the same agents without the rows of their
vocabulary that they never say; a quiet machine. Both add to the JSON file RECORD, from which ``page`` prints the tables
of docs/evidence.md, and ``python -m benchmarks.report`` draws the verdict.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.harness.command import exit_code
from benchmarks.harness.machine import origin
from benchmarks.harness.timing import Ratio
from recmas import RecursiveMAS
from recmas.evaluation import METRICS
from recmas.files import write_atomically
from recmas.lab.build import RECORD as BUILT
from recmas.lab.grid import shuffled
from recmas.lab.tasks import LIST, task_of

WORLDS = 2028
"""Seed of the test worlds; links are chosen, and settings were tried, on validation worlds."""
BATCH = 256
BATCHES = (1, 16, 64)
LEAST = 16
"""Questions of a turn, however few at once."""
TERSE = "text, own tokens alone"
KEPT = ("seed", "link_seed", "commit", "validation_accuracy", "pretraining")


def answers(lab: Path, count: int) -> list[dict[str, Any]]:
    """A cell per way of answering: which questions were right, and tokens and latent steps of each."""
    system, built = _system(lab), json.loads((lab / BUILT).read_text(encoding="utf-8"))
    rows = LIST.questions("test", WORLDS, LIST.hops, count)
    cells = []
    for way, mode, hook in (("text", "text", None), ("latent", "latent", None), ("shuffled", "latent", shuffled)):
        found = system.answer(rows, mode=mode, batch_size=BATCH, on_message=hook)
        right = [int(METRICS["last_word"](one.text, str(row["answer"]))) for one, row in zip(found, rows, strict=True)]
        cell: dict[str, Any] = {"way": way, **{name: built[name] for name in KEPT}, "correct": right}
        cell["text_tokens"] = sum(sum(one.text_tokens.values()) for one in found) / count
        cell["latent_steps"] = sum(sum(one.latent_steps.values()) for one in found) / count
        cells.append(cell)
    return cells


def times(lab: Path, turns: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    """A cell per threads, batch and way: seconds per question of each turn. One turn more warms up."""
    system = _system(lab)
    ways = {"text": (system, "text"), "latent": (system, "latent"), TERSE: (_narrow(lab), "text")}
    cells = []
    for number in threads:
        torch.set_num_threads(number)
        for batch in BATCHES:
            rows = LIST.questions("test", WORLDS, LIST.hops, max(LEAST, batch))
            spent: dict[str, list[float]] = {way: [] for way in ways}
            said = {}
            for turn in range(turns + 1):
                for way, (asked, mode) in ways.items():
                    started = time.perf_counter()
                    found = asked.answer(rows, mode=mode, batch_size=batch)
                    if turn:
                        spent[way].append(round((time.perf_counter() - started) / len(rows), 7))
                    said[way] = [(one.text, one.text_tokens) for one in found]
                if said["text"] != said[TERSE]:
                    raise ValueError(f"{lab}: without the tokens that they never say, its agents say something else")
            cells += [
                {"threads": number, "batch": batch, "way": way, "seconds": seconds} for way, seconds in spent.items()
            ]
    return cells


def _system(lab: Path) -> RecursiveMAS:
    system = RecursiveMAS.from_pretrained(lab)
    if (task := task_of(system)) is not LIST:
        raise ValueError(f"{lab}: is a lab of the task {task.name!r}, not of {LIST.name!r}")
    return system


def _narrow(lab: Path) -> RecursiveMAS:
    """The system with tables of the tokens that its agents know, and no others."""
    system = RecursiveMAS.from_pretrained(lab, accelerate=False)
    for agent in system.agents.values():
        agent.model.resize_token_embeddings(len(agent.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        system.to(dtype=torch.float16).save_pretrained(folder)
        return RecursiveMAS.from_pretrained(folder)


def add(record: Path, part: str, head: dict[str, Any], cells: Sequence[dict[str, Any]], same: Sequence[str]) -> None:
    """Add cells to a part of RECORD, in the place of those of the same names.

    Raises:
        ValueError: the part is of other settings.
    """
    stored: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    earlier = stored.get(part, {"cells": []})
    if earlier["cells"] and any(earlier[name] != value for name, value in head.items()):
        raise ValueError(f"{record}: its {part} are of other settings; write to a new file")
    new = {tuple(cell[name] for name in same) for cell in cells}
    kept = [cell for cell in earlier["cells"] if tuple(cell[name] for name in same) not in new]
    stored[part] = {**head, "made": origin(), "cells": [*kept, *cells]}
    write_atomically(record, _compact(stored))


def _compact(stored: dict[str, Any]) -> str:
    """JSON with a line per cell."""
    parts = []
    for part, held in stored.items():
        head = json.dumps({name: value for name, value in held.items() if name != "cells"})[:-1]
        cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in held["cells"])
        parts.append(f'"{part}": {head}, "cells": [\n{cells}\n]}}')
    return "{" + ",\n".join(parts) + "}\n"


def timed(record: dict[str, Any]) -> Iterator[tuple[int, int, list[float], list[float], list[float]]]:
    """Threads, batch, and seconds of text, latents and text of the tokens in use."""
    cells = {(cell["threads"], cell["batch"], cell["way"]): cell["seconds"] for cell in record["times"]["cells"]}
    for threads, batch in dict.fromkeys(key[:2] for key in cells):
        text, latent, terse = (cells[threads, batch, way] for way in ("text", "latent", TERSE))
        yield threads, batch, text, latent, terse


def page(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the tables in docs/evidence.md."""
    cells = {(cell["seed"], cell["link_seed"], cell["way"]): cell for cell in record["answers"]["cells"]}
    yield "| pretraining seed | link seed | text | latents | latents of other questions | validation, latents |"
    yield "|---|---|---|---|---|---|"
    for seed, link_seed in dict.fromkeys(key[:2] for key in cells):
        each = [cells[seed, link_seed, way] for way in ("text", "latent", "shuffled")]
        shares = " | ".join(f"{statistics.fmean(cell['correct']):.4f}" for cell in each)
        yield f"| {seed} | {link_seed} | {shares} | {each[0]['validation_accuracy']:.4f} |"
    yield ""
    yield "| threads | questions at once | text | latents | latents to text | text, own tokens alone |"
    yield "|---|---|---|---|---|---|"
    for threads, batch, *ways in timed(record):
        text, latent, terse = (
            "{:.2f} [{:.2f}, {:.2f}] ms".format(*(1e3 * value for value in (statistics.median(s), min(s), max(s))))
            for s in ways
        )
        ratio = Ratio.of(ways[1], ways[0])
        share = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        yield f"| {threads} | {batch} | {text} | {latent} | {share} | {terse} |"


def run(options: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    if options.step == "page":
        print(*page(json.loads(options.record.read_text(encoding="utf-8"))), sep="\n")
        return
    if options.step == "answers":
        if not options.labs:
            raise ValueError("labs: none is named")
        head = {"questions": {"count": options.questions, "seed": WORLDS}}
        for lab in options.labs:
            add(options.record, "answers", head, answers(lab, options.questions), ("seed", "link_seed", "way"))
        return
    if len(options.labs) != 1:
        raise ValueError(f"labs: one is timed, got {len(options.labs)}")
    (lab,) = options.labs
    head = {"turns": options.turns}
    add(options.record, "times", head, times(lab, options.turns, options.threads), ("threads", "batch", "way"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lists", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("step", choices=("answers", "times", "page"))
    parser.add_argument("labs", type=Path, nargs="*")
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    return exit_code(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
