"""Training of the links, in three stages; the agents themselves are always frozen.

    train_inner(system, rows, InnerConfig(steps=250, ...))      each agent's R_in
    train_warmup(system, rows, WarmupConfig(steps=250, ...))    each edge's R_out, without answers
    train_outer(system, rows, OuterConfig(rounds=(1, 2, 3)))    all R_out together, by the answer
    train_all(system, rows, AllConfig(steps=250, ...))          these three, one after the other

All change the system's links in place (``system.save_pretrained`` keeps them), take rows as a JSONL path, a sequence or
a callable ``batch index -> rows`` (`recmas.training.data`), and run on one step loop (`recmas.training.loop`), in one
process or several (`recmas.training.processes`): with ``output=FOLDER`` they log and write checkpoints there, with
``resume=True`` they go on from them, bit for bit. With ``cache=FOLDER`` the first two run each text through its frozen
agent once (`recmas.training.pair_cache`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recmas.prompts.jsonl import read_rows
from recmas.training.config import AllConfig, InnerConfig, LoopConfig, OuterConfig, WarmupConfig

if TYPE_CHECKING:
    from recmas.training.all_stages import train_all
    from recmas.training.data import DataSource, read_texts
    from recmas.training.inner import inner_loss, train_inner
    from recmas.training.outer import train_outer
    from recmas.training.pair_cache import PairCache
    from recmas.training.recursion import outer_loss
    from recmas.training.sharding import shard_agents
    from recmas.training.step_log import StepRecord, TrainingResult
    from recmas.training.warmup import train_warmup, warmup_loss

_HOMES = {
    "DataSource": "data",
    "PairCache": "pair_cache",
    "StepRecord": "step_log",
    "read_texts": "data",
    "TrainingResult": "step_log",
    "inner_loss": "inner",
    "shard_agents": "sharding",
    "outer_loss": "recursion",
    "train_all": "all_stages",
    "train_inner": "inner",
    "train_outer": "outer",
    "train_warmup": "warmup",
    "warmup_loss": "warmup",
}
"""Modules of what needs torch."""

__all__ = [
    "AllConfig",
    "DataSource",
    "InnerConfig",
    "LoopConfig",
    "OuterConfig",
    "PairCache",
    "StepRecord",
    "TrainingResult",
    "WarmupConfig",
    "inner_loss",
    "outer_loss",
    "read_rows",
    "read_texts",
    "shard_agents",
    "train_all",
    "train_inner",
    "train_outer",
    "train_warmup",
    "warmup_loss",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch on first use, so that ``recmas train --help`` is fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"recmas.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
