"""All three stages, one after the other: inner, warm-up, outer; resumable as a whole.

Everything is checked, for all stages, before the first one begins. A stage that is done is read from its checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recmas.config.system_json import edge_name
from recmas.prompts.jsonl import read_rows
from recmas.system.system import System
from recmas.training.alignment import Cache
from recmas.training.config import AllConfig
from recmas.training.data import RowSource
from recmas.training.inner import train_inner
from recmas.training.loop import OnStart, OnStep, begins
from recmas.training.outer import train_outer
from recmas.training.progress import Shown
from recmas.training.step_log import TrainingResult
from recmas.training.warmup import train_warmup


def train_all(
    system: System,
    rows: RowSource,
    config: AllConfig | None = None,
    *,
    texts: RowSource | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    cache: Cache | None = None,
    resume: bool = False,
    progress: Shown = True,
    trackers: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> dict[str, TrainingResult]:
    """Train every link in place: inner links, their warm-up, and all outer links by the answer.

    Args:
        system: whose agents and links these are.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``, as for `train_outer`.
        config: settings; None takes the defaults.
        texts: rows of the first two stages, any texts for example; None takes ``rows``.
        validation: rows, not a callable, whose loss is measured now and then in every stage; with ``texts``, which
            they need not resemble, in the last one alone, and so ``patience`` is of that one.
        output: folder of logs and checkpoints, one folder per run; None keeps none.
        cache: `PairCache`, or its folder, as for `train_inner`.
        resume: go on where the folder's checkpoints stopped, in whichever stage that was.
        progress: show bars where stderr is a terminal; "always" wherever it goes.
        trackers: names of trackers (`recmas.training.trackers`) that get every step's record.
        on_step: called after every step with its record; a true answer ends that run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Returns:
        What each run did: ``inner <role>``, ``warmup <source>-><target>``, ``outer``.

    Raises:
        ValueError: as the stages.
    """
    rows = read_rows(rows) if isinstance(rows, str | os.PathLike) else rows
    inner, warmup, outer = (config or AllConfig()).stages(system.defaults.rounds)
    said: Any = rows if texts is None else texts
    shared: dict[str, Any] = {
        "output": output,
        "resume": resume,
        "progress": progress,
        "trackers": trackers,
        "on_step": on_step,
    }
    aligned = shared | {"cache": cache, "validation": validation if texts is None else None}
    if texts is not None:
        inner, warmup = replace(inner, patience=None), replace(warmup, patience=None)
    stages: list[tuple[str, Any]] = [
        ("inner", lambda **options: train_inner(system, said, inner, **aligned, **options)),
        ("warmup", lambda **options: train_warmup(system, said, warmup, **aligned, **options)),
        ("outer", lambda **options: train_outer(system, rows, outer, validation=validation, **shared, **options)),
    ]
    for _, run in stages:
        run(on_start=lambda: True)
    if not begins(on_start):
        return {}
    results: dict[str, TrainingResult] = {}
    for stage, run in stages:
        done = run()
        for key, result in done.items() if isinstance(done, dict) else [("", done)]:
            results[f"{stage} {key if isinstance(key, str) else edge_name(key)}".strip()] = result
    return results
