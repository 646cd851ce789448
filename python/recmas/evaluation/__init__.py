"""How good a system is on questions with known answers, and what that costs.

`sweep` answers the questions in every cell of a sweep, `summarize` adds up a cell, `read_data` finds the questions.
Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recmas.evaluation.data import read_data
from recmas.evaluation.intervals import pass_at, wilson
from recmas.evaluation.metrics import METRICS
from recmas.evaluation.records import MODES, Cell, Record
from recmas.evaluation.summary import Summary, summarize

if TYPE_CHECKING:
    from recmas.evaluation.baselines import looped_model, single_agent
    from recmas.evaluation.sweeps import Sweep, sweep

__all__ = [
    "METRICS",
    "MODES",
    "Cell",
    "Record",
    "Summary",
    "Sweep",
    "looped_model",
    "pass_at",
    "read_data",
    "single_agent",
    "summarize",
    "sweep",
    "wilson",
]


_MODULE_OF = {"Sweep": "sweeps", "sweep": "sweeps", "looped_model": "baselines", "single_agent": "baselines"}


def __getattr__(name: str) -> Any:
    """Load what needs torch on first use, so that ``recmas eval --help`` is fast."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"recmas.evaluation.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
