"""Whether a module still is what somebody found it to be: parts, classes, attributes, hooks; not values of weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from recmas_kernels.backends import cpu

_GROUPS = ("_parameters", "_modules", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_INNER = frozenset(nn.Module().__dict__) - {"training"}
"""What every module has: the groups are watched by what is in them, the rest says nothing about a result."""


class Watch:
    """A module as it is now; the kernels must be there.

    Of all its parts: classes and their ``forward``, attributes by identity, parameters, buffers and children by
    identity. Hooks of parts count as a change, those of the module itself do not, as it is called through them.

    Args:
        module: with all its parts.
        ignored: names of attributes that may change.
    """

    def __init__(self, module: nn.Module, ignored: frozenset[str] = frozenset()) -> None:
        entries: list[Any] = []
        sizes: list[Any] = []
        kinds: list[Any] = []
        for part in module.modules():
            held = part.__dict__
            kinds += (part, type(part), type(part).forward)
            sizes += (held, len(held))
            for name, value in held.items():
                if name not in _INNER and name not in ignored and not (part is module and name == "forward"):
                    entries += (held, name, value)
                    entries += _attention_of(value)
            for group in _GROUPS:
                sizes += (held[group], len(held[group]))
                for name, value in held[group].items():
                    entries += (held[group], name, value)
            if part is not module:
                for name in _HOOKS:
                    sizes += (held[name], 0)
        self._watched = tuple(entries), tuple(sizes), tuple(kinds)

    def unchanged(self) -> bool:
        """Whether all of it is the same; 2 us for a decoder layer."""
        return cpu.unchanged(*self._watched)


def _attention_of(config: Any) -> tuple[Any, ...]:
    """The entry of a model's configuration that says which attention its layers run."""
    name = "_attn_implementation_internal"
    held = getattr(config, "__dict__", {})
    return (held, name, held[name]) if name in held else ()
