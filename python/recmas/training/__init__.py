"""Training of the links, in three stages; the agents themselves are always frozen.

    train_inner(system, rows, InnerConfig(steps=250, ...))      each agent's R_in
    train_warmup(system, rows, WarmupConfig(steps=250, ...))    each edge's R_out, without answers
    train_outer(system, rows, OuterConfig(rounds=(1, 2, 3)))    all R_out together, by the answer

All three change the system's links in place (``system.save_pretrained`` keeps them), take rows as a JSONL path, a
sequence or a callable ``batch index -> rows`` (`recmas.training.data`), and run on one step loop
(`recmas.training.loop`): with ``output=FOLDER`` they log and write checkpoints there, with ``resume=True`` they go on
from them, bit for bit.
"""

from recmas.training.data import DataSource, read_rows
from recmas.training.inner import InnerConfig, inner_loss, train_inner
from recmas.training.loop import LoopConfig, StepRecord, TrainingResult
from recmas.training.outer import OuterConfig, outer_loss, train_outer
from recmas.training.warmup import WarmupConfig, train_warmup, warmup_loss

__all__ = [
    "DataSource",
    "InnerConfig",
    "LoopConfig",
    "OuterConfig",
    "StepRecord",
    "TrainingResult",
    "WarmupConfig",
    "inner_loss",
    "outer_loss",
    "read_rows",
    "train_inner",
    "train_outer",
    "train_warmup",
    "warmup_loss",
]
