"""How long a step takes: two steps of each run, of which nothing is kept, and the seconds of the second."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.config import InnerConfig, LoopConfig, OuterConfig
from recmas.training.inner import train_inner
from recmas.training.outer import train_outer
from recmas.training.pair_cache import PairCache
from recmas.training.processes import processes
from recmas.training.step_log import TrainingResult
from recmas.training.warmup import train_warmup


def step_seconds(
    system: System,
    rows: Sequence[Fields],
    config: LoopConfig,
    keys: Sequence[Any] | None = None,
    cached: str | None = None,
) -> dict[Any, float]:
    """Seconds of a step of each run of a stage, measured; the links that it trains are changed.

    Args:
        system: whose agents and links these are.
        rows: of the stage.
        config: of the stage, which says which one it is. An outer step is taken through the most rounds of all.
        keys: roles or edges; None takes all.
        cached: dtype of a cache of pairs (`PairCache`), which a temporary one stands for, of two batches; None is
            none, and so is what several processes are measured with.

    Returns:
        By role or edge; of the outer stage, whose links learn together, by "outer".
    """
    short = replace(config, steps=2, patience=None)
    quiet: dict[str, Any] = {"progress": False}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # the run itself warns
        if isinstance(short, OuterConfig):
            whole = replace(short, rounds=short.most_rounds)
            return {"outer": _second(train_outer(system, rows, whole, edges=keys, **quiet))}
        if cached is not None and processes().count == 1:
            quiet["cache"] = PairCache(folder, cached)
        results: Any = (
            train_inner(system, rows, short, roles=keys, **quiet)
            if isinstance(short, InnerConfig)
            else train_warmup(system, rows, short, edges=keys, **quiet)  # type: ignore[arg-type]
        )
    return {key: _second(result) for key, result in results.items()}


def _second(result: TrainingResult) -> float:
    """Of two steps: the first one makes what later ones find, such as packed weights."""
    first, second = result.records
    return second.seconds - first.seconds
