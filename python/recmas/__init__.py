"""RecursiveMAS: frozen language models that think together through latent messages.

Every public name of the runtime is here; `recmas.training` and `recmas.evaluation` hold those of their stages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recmas.agents.agent import Agent
    from recmas.answering.answers import Answer, Answers, Handoff, RowsFailedError
    from recmas.answering.options import AnswerOptions
    from recmas.config.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Pattern, Visit
    from recmas.config.system_json import AgentSpec, Decoding, Defaults, PlacementSpec, PromptSpec
    from recmas.engine.messages import Latents
    from recmas.recursive_mas import RecursiveMAS
    from recmas.tools import Tool, Toolbox, ToolCall
    from recmas.tools.python import PythonTool
    from recmas_kernels import __version__

_HOMES = {
    "recmas.agents.agent": ("Agent",),
    "recmas.answering.answers": (
        "Answer",
        "Answers",
        "Handoff",
        "RowsFailedError",
    ),
    "recmas.answering.options": ("AnswerOptions",),
    "recmas.config.pattern": (
        "DELIBERATION",
        "DISTILLATION",
        "MIXTURE",
        "Pattern",
        "SEQUENTIAL",
        "Visit",
    ),
    "recmas.config.system_json": (
        "AgentSpec",
        "Decoding",
        "Defaults",
        "PlacementSpec",
        "PromptSpec",
    ),
    "recmas.engine.messages": ("Latents",),
    "recmas.recursive_mas": ("RecursiveMAS",),
    "recmas.tools": (
        "Tool",
        "ToolCall",
        "Toolbox",
    ),
    "recmas.tools.python": ("PythonTool",),
    "recmas_kernels": ("__version__",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "DELIBERATION",
    "DISTILLATION",
    "MIXTURE",
    "SEQUENTIAL",
    "Agent",
    "AgentSpec",
    "Answer",
    "AnswerOptions",
    "Answers",
    "Decoding",
    "Defaults",
    "Handoff",
    "Latents",
    "Pattern",
    "PlacementSpec",
    "PromptSpec",
    "PythonTool",
    "RecursiveMAS",
    "RowsFailedError",
    "Tool",
    "ToolCall",
    "Toolbox",
    "Visit",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch and transformers on first use, so that ``recmas --help`` is fast."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
