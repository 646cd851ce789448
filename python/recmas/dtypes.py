"""Names of the dtypes that a system may ask for. No torch here."""

from __future__ import annotations

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What ``system.json``, the command line and `Agent.from_pretrained` take; "auto" is the checkpoint's own."""
