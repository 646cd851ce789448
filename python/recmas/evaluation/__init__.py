"""How good a system is on questions with known answers, and what that costs.

`recmas.evaluation.sweep.sweep` answers the questions in every cell of a sweep, `summary.summarize` says what came of a
cell, `data.read_data` finds the questions. Importing this package imports no torch.
"""

from __future__ import annotations

from recmas.evaluation.intervals import pass_at, wilson
from recmas.evaluation.metrics import METRICS
from recmas.evaluation.records import MODES, Cell, Record
from recmas.evaluation.summary import Summary, summarize

__all__ = ["METRICS", "MODES", "Cell", "Record", "Summary", "pass_at", "summarize", "wilson"]
