"""The sweep: every question in every cell, a record each, each cell summed up.

With an output file each batch's records are appended as JSON lines as soon as they exist. Calling again with the same
arguments answers only what is missing, and a larger sweep only what is new; records of another system, other settings
or other rows are refused. Of an agent's weights only a sample of each tensor is compared: fine-tuned weights are
distinguished, weights in which a few single elements differ may not be.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from recmas.answering.answers import RowError, RowsFailedError, without_answer
from recmas.answering.manner import Manner
from recmas.answering.options import AnswerOptions
from recmas.evaluation import records as record_file
from recmas.evaluation.answerer import Answerer
from recmas.evaluation.baselines import variant
from recmas.evaluation.data import expected_answers
from recmas.evaluation.fingerprint import key_of
from recmas.evaluation.metrics import METRICS, check_metric
from recmas.evaluation.records import MODES, Cell, Record
from recmas.evaluation.summary import Summary, summarize
from recmas.files.locks import one_writer
from recmas.prompts.rows import Fields
from recmas.recursive_mas import RecursiveMAS

Steps = int | Mapping[str, int] | None
AUTO_GROUP = 128  # questions whose records are written together where memory decides the batches


class Sweep(NamedTuple):
    """Records in the order of cells, samples and rows; a summary per cell."""

    records: list[Record]
    summaries: list[Summary]


def sweep(
    system: Answerer,
    rows: Sequence[Fields],
    *,
    metric: str = "exact",
    answer_field: str = "answer",
    modes: Sequence[str] = ("latent",),
    rounds: Sequence[int | None] = (None,),
    latent_steps: Sequence[Steps] = (None,),
    samples: int = 1,
    options: AnswerOptions | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **changes: Any,
) -> Sweep:
    """Answer every row in every cell of modes x rounds x latent steps, and compare with its answer.

    Args:
        system: what answers, in this process or in others.
        rows: questions with the fields its templates name, and the answer.
        metric: name of one of `METRICS`.
        answer_field: field of the row that holds the answer.
        modes: "latent", "text", "single" or "loop"; `recmas.evaluation.baselines` says what each runs. Cells that a
            mode cannot distinguish (rounds of a single agent, latent steps of texts or of a loop of one round) are run
            once.
        rounds: None is the system's own.
        latent_steps: for all agents, or by role; None is the system's own.
        samples: answers to each question, with random streams of their own.
        options: how questions are answered, but for mode, rounds and latent steps, which are swept. A batch draws from
            the seed, the sample's number and the number of the batch's first question, so cells differ by what they do
            and not by luck. ``batch_size="auto"`` answers as many questions as memory holds, within groups of 128 that
            stand for the batch here: seeds and records are the same on every machine. ``prefix_reuse`` is no part of
            what distinguishes one run's records from another's.
        output: JSONL file of records, written batch by batch; None keeps them in memory only.
        progress: show a bar where stderr is a terminal.
        changes: fields of `AnswerOptions`, in place of those of `options`.

    Raises:
        ValueError: before any model runs: an unknown mode or metric, a cell that the system cannot run, no rows, a row
            without an answer or a field or too long for an agent, several samples of greedy answers, or an output file
            of another run. At the end, rows that agents' texts made too long; at the end of its batch, a row without
            an answer for another reason, such as a lost process. What the others answered is in the output.
        ImportError: the metric's library is missing.
    """
    check_metric(metric)
    options = AnswerOptions.of(options, **changes)
    group = options.batch_size if isinstance(options.batch_size, int) else AUTO_GROUP
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    expected = expected_answers(rows, answer_field)
    decoding = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
    if options.settle is not None:  # records of runs without it keep their keys
        decoding["settle"] = options.settle
    toolbox = options.toolbox
    cells = _cells(system, modes, rounds, latent_steps)
    answerers: list[Answerer] = []
    manners: list[Manner] = []
    for cell in cells:
        answerer, mode = variant(system, cell.mode)
        asked = replace(options, mode=mode, rounds=cell.rounds, latent_steps=cell.steps)
        answerer.check(rows, asked)
        answerers.append(answerer)
        manners.append(Manner(answerer.outline, asked))
        if samples > 1 and all(how.temperature == 0 for how in manners[-1].decoding.values()):
            raise ValueError(f"samples: {samples} greedy answers are one and the same; set a temperature above 0")
    called = [*sorted(toolbox.tools), toolbox.max_calls, toolbox.max_output] if toolbox.tools else []
    settings = json.dumps(
        [system.fingerprint(), metric, answer_field, options.seed, options.batch_size, decoding, called]
    )

    def key(cell: Cell, sample: int, index: int) -> str | None:
        if not 0 <= index < len(rows):
            return None
        return key_of(settings, cell, sample, index, rows[index])

    keys = {
        (number, sample, index): str(key(cell, sample, index))
        for number, cell in enumerate(cells)
        for sample in range(samples)
        for index in range(len(rows))
    }
    path = None if output is None else Path(output)
    hidden = None if progress else True  # None: where stderr is not a terminal
    with (
        nullcontext() if path is None else one_writer(path),
        tqdm(total=len(keys), desc="evaluate", disable=hidden, unit="question", delay=1, leave=False) as bar,
    ):
        done = {} if path is None else record_file.read(path, key)
        bar.update(sum(name in done for name in keys.values()))
        firsts = range(0, len(rows), group)
        failed: dict[int, Exception] = {}
        for (number, cell), sample, first in product(enumerate(cells), range(samples), firsts):
            batch = range(first, min(first + group, len(rows)))
            missing = [index for index in batch if keys[number, sample, index] not in done]
            if not missing:
                continue
            bar.set_postfix_str(f"{cell.mode}, {cell.rounds} rounds, {cell.steps} steps", refresh=False)
            memory = _PeakMemory(answerers[number])
            unanswered: dict[int, Exception] = {}
            try:  # whole batches, that nothing depends on where a run was cut short
                answers = answerers[number].answer(
                    [rows[index] for index in batch],
                    replace(manners[number].options, seed=batch_seed(options.seed, sample, first)),
                )
            except RowsFailedError as error:  # the others are recorded, and not asked again
                answers, unanswered = error.answers, {batch[row]: why for row, why in error.failed.items()}
            failed |= unanswered
            seconds = {stage: spent / len(batch) for stage, spent in answers.seconds.items()}
            peak = memory.peak()
            made = [
                Record(
                    *cell,
                    sample=sample,
                    index=index,
                    key=keys[number, sample, index],
                    text=answers[index - first].text,
                    expected=expected[index],
                    correct=METRICS[metric](answers[index - first].text, expected[index]),
                    text_tokens=sum(answers[index - first].text_tokens.values()),
                    latent_steps=sum(answers[index - first].latent_steps.values()),
                    seconds=seconds,
                    peak_memory=peak,
                    tool_calls=len(answers[index - first].tool_calls),
                )
                for index in missing
                if index not in unanswered
            ]
            if path is not None:
                record_file.append(path, made)
            done.update({record.key: record for record in made})
            bar.update(len(missing))
            if others := {row: why for row, why in unanswered.items() if not isinstance(why, RowError)}:
                raise ValueError(without_answer(others, len(rows))) from others[min(others)]
    if failed:
        raise ValueError(without_answer(failed, len(rows)))
    records = [done[name] for name in keys.values()]
    size = samples * len(rows)
    return Sweep(records, [summarize(records[start : start + size]) for start in range(0, len(records), size)])


def batch_seed(seed: int, sample: int, first: int) -> int:
    """The seed that `RecursiveMAS.answer` gets for the batch that begins with row `first`."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{sample},{first}".encode(), digest_size=8).digest(), "big")


def _cells(
    system: Answerer, modes: Iterable[str], rounds: Iterable[int | None], latent_steps: Iterable[Steps]
) -> list[Cell]:
    """The cells that differ, in the order of the product, with the system's own settings filled in."""
    cells: list[Cell] = []
    for mode, count, asked in product(modes, rounds, latent_steps):
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        count = system.defaults.rounds if count is None else count
        by_role = system.steps_by_role(asked)
        thinks = mode == "latent" or (mode == "loop" and count > 1)
        alike = mode == "loop" or len(set(by_role.values())) == 1
        steps = by_role[system.pattern.last] if alike else by_role
        cell = Cell(mode, 1 if mode == "single" else count, steps if thinks else 0)
        if cell not in cells:
            cells.append(cell)
    if not cells:
        raise ValueError("modes, rounds, latent_steps: expected at least one of each")
    return cells


class _PeakMemory:
    """The peak of what `Record.peak_memory` describes, from now on where that can be had."""

    def __init__(self, system: Answerer) -> None:
        devices = system.devices.values() if isinstance(system, RecursiveMAS) else ()
        self._devices = {device for device in devices if device.type == "cuda"}
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int:
        """Bytes."""
        if self._devices:
            return sum(torch.cuda.max_memory_allocated(device) for device in self._devices)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
