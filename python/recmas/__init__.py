"""RecursiveMAS: frozen language models that think together through latent messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recmas.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Pattern

if TYPE_CHECKING:
    from recmas.agent import Agent
    from recmas.system import RecursiveMAS
    from recmas_kernels import __version__

__all__ = ["DELIBERATION", "DISTILLATION", "MIXTURE", "SEQUENTIAL", "Agent", "Pattern", "RecursiveMAS", "__version__"]


def __getattr__(name: str) -> Any:
    """Load what needs torch and transformers on first use, so that ``recmas --help`` is fast."""
    if name == "Agent":
        from recmas.agent import Agent

        return Agent
    if name == "RecursiveMAS":
        from recmas.system import RecursiveMAS

        return RecursiveMAS
    if name == "__version__":
        from recmas_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
