"""Forward hooks of a model: Python that may do anything, so that nobody can foresee what the model computes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as of_all_modules

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Of modules; those of the backward pass change no result."""
OF_ALL: tuple[dict[int, Any], ...] = (of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)
_TELL = "transformers.utils.output_capturing"
"""Where hooks are from that only tell hidden states; a model that was once asked for them keeps those for good."""


def hooked(model: nn.Module) -> bool:
    """Whether a call of the model, or of a part of it, calls hooks that may change its result."""
    places = [*OF_ALL, *(getattr(part, name) for part in model.modules() for name in HOOKS)]
    return any(getattr(hook, "__module__", None) != _TELL for held in places if held for hook in held.values())
