"""How good a system is on questions with known answers, and what that costs.

`sweep` answers the questions in every cell of a sweep, `summarize` adds up a cell, `read_data` finds the questions.
`audit` asks whether it is the latents' content that makes the difference.
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
    from recmas.evaluation.audits import audit
    from recmas.evaluation.baselines import looped_model, single_agent
    from recmas.evaluation.findings import ArmResult, Audit, Outcome
    from recmas.evaluation.interventions import ARMS
    from recmas.evaluation.paired import Difference
    from recmas.evaluation.sweeps import Sweep, sweep
    from recmas.evaluation.tuning import Trial, Tuned, tune

__all__ = [
    "ARMS",
    "METRICS",
    "MODES",
    "ArmResult",
    "Audit",
    "Cell",
    "Difference",
    "Outcome",
    "Record",
    "Summary",
    "Sweep",
    "Trial",
    "Tuned",
    "audit",
    "looped_model",
    "pass_at",
    "read_data",
    "single_agent",
    "summarize",
    "sweep",
    "tune",
    "wilson",
]


_NAMES = {
    "audits": ("audit",),
    "baselines": ("looped_model", "single_agent"),
    "findings": ("ArmResult", "Audit", "Outcome"),
    "interventions": ("ARMS",),
    "paired": ("Difference",),
    "sweeps": ("Sweep", "sweep"),
    "tuning": ("Trial", "Tuned", "tune"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load what needs torch on first use, so that ``recmas eval --help`` is fast."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"recmas.evaluation.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
