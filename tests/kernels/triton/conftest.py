"""Keeps the interpreter's tests out of an ordinary session: Triton decides at import whether kernels are interpreted.

``test_interpreter.py`` runs them in a process of its own; by hand: ``TRITON_INTERPRET=1 pytest tests/kernels/triton``.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_interpreter.py", "test_compiled.py", "test_plan.py"] if INTERPRETED else ["interpreted"]
