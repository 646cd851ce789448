"""RecursiveMAS: frozen language models that think together through latent messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recmas.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Pattern

if TYPE_CHECKING:
    from recmas.agent import Agent
    from recmas.system import RecursiveMAS

__version__ = "0.1.0"
__all__ = ["DELIBERATION", "DISTILLATION", "MIXTURE", "SEQUENTIAL", "Agent", "Pattern", "RecursiveMAS"]


def __getattr__(name: str) -> Any:
    """Load what needs torch and transformers on first use, so that ``recmas --help`` is fast."""
    if name == "Agent":
        from recmas.agent import Agent

        return Agent
    if name == "RecursiveMAS":
        from recmas.system import RecursiveMAS

        return RecursiveMAS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
