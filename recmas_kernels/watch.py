"""Whether a module still is what somebody found it to be: parts, classes, attributes, hooks; not values of weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from recmas_kernels.backends import cpu
from recmas_kernels.frozen_linear import FrozenLinear

_GROUPS: tuple[str, ...] = ("_parameters", "_modules", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Of modules; those of the backward pass change no result."""
_INNER = frozenset(nn.Module().__dict__) - {"training"}
"""What every module has: parameters, buffers and children are watched one by one, the rest decides no result."""


class Watch:
    """A module as it is now, with parts that are packed `FrozenLinear`s.

    Of all parts: classes and their ``forward``, attributes by identity, parameters, buffers and children by identity,
    and whether packed weights still stand for their panels. Hooks of parts count as a change; those of the module
    itself do not, as it is called through them.

    Args:
        module: with all its parts.
    """

    def __init__(self, module: nn.Module) -> None:
        entries: list[Any] = []
        sizes: list[Any] = []
        kinds: list[Any] = []
        stand_ins: list[Any] = []
        for part in module.modules():
            held = part.__dict__
            kinds += (part, type(part))
            sizes += (held, len(held))
            if isinstance(part, FrozenLinear):  # computes with its weight and bias alone
                stand_ins.append(part._parameters["weight"])
                groups = _GROUPS[:1]
            else:
                groups = _GROUPS
                for name, value in held.items():
                    if name not in _INNER and not (part is module and name == "forward"):
                        entries += (held, name, value)
                        entries += _attention_of(value)
            for group in groups:
                sizes += (held[group], len(held[group]))
                for name, value in held[group].items():
                    entries += (held[group], name, value)
            if part is not module:
                for name in HOOKS:
                    sizes += (held[name], 0)
        classes = {type(part): type(part).forward for part in module.modules()}
        forwards = [item for pair in classes.items() for item in pair]
        self._watched = tuple(entries), tuple(sizes), tuple(kinds), tuple(forwards), tuple(stand_ins)

    def unchanged(self) -> bool:
        """Whether all of it is the same."""
        return cpu.unchanged(*self._watched)


def _attention_of(config: Any) -> tuple[Any, ...]:
    """The entry of a model's configuration that says which attention its layers run."""
    name = "_attn_implementation_internal"
    held = getattr(config, "__dict__", {})
    return (held, name, held[name]) if name in held else ()
