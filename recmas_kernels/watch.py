"""Whether a module still is what somebody found it to be: parts, classes, attributes, hooks; not values of weights."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from recmas_kernels.backends import cpu
from recmas_kernels.frozen_linear import FrozenLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Of modules; those of the backward pass change no result."""
CALLS = ("__call__", "_call_impl")
"""Of classes of modules: what runs their ``forward``."""
_GROUPS: tuple[str, ...] = ("_parameters", "_modules", "_buffers")
INNER = frozenset(nn.Module().__dict__) - {"training"}
"""What every module has: parameters, buffers and children are watched one by one, the rest decides no result."""
_IMPLEMENTATION = "_attn_implementation_internal"
_LEFT_OUT = ("torch.", "builtins", "recmas_kernels.")
"""Modules whose functions nobody replaces to change a model."""
_TABLES = ("_local_mapping", "_global_mapping")
"""Of a configuration, the name of the attention that layers run; and where transformers finds it by this name."""


class Watched:
    """Python objects as they are now.

    A dictionary of which CPython says that it was not changed since it was last compared is not compared again.

    Args:
        entries: dictionary, key and value, in a row; a weak reference stands for its object, or that one's dictionary.
        sizes: dictionary and how many keys it has.
        kinds: object, its class, and its dictionary or None.
        classes: class, name of an attribute, and the attribute.
        stand_ins: tensors of one element for all.
    """

    def __init__(
        self,
        entries: Iterable[Any],
        sizes: Iterable[Any],
        kinds: Iterable[Any],
        classes: Iterable[Any],
        stand_ins: Iterable[Any] = (),
    ) -> None:
        self._entries, self._sizes = tuple(entries), tuple(sizes)
        self._others, self._stand_ins = (tuple(kinds), tuple(classes)), tuple(stand_ins)
        # Without kernels nothing stands for a module, and nobody asks whether it is the same.
        self._stood_in = None if cpu.unavailable() else cpu.stand_ins(self._stand_ins)
        self._places = tuple({id(place): place for place in (*self._entries[::3], *self._sizes[::2])}.values())
        self._versions: bytes | None = None

    @classmethod
    def of_all(cls, parts: Iterable[Watched]) -> Watched:
        """All that these watch, once."""
        groups: tuple[dict[Any, Any], ...] = ({}, {}, {}, {}, {})
        for part in parts:
            watched = (part._entries, part._sizes, *part._others, part._stand_ins)
            for group, row, width in zip(groups, watched, (3, 2, 3, 3, 1), strict=True):
                for i in range(0, len(row), width):
                    each = row[i : i + width]
                    group[tuple(item if type(item) in (int, str) else id(item) for item in each)] = each
        return cls(*(tuple(item for each in group.values() for item in each) for group in groups))

    def unchanged(self) -> bool:
        """Whether all of it is the same."""
        before, now = self._versions, cpu.versions(self._places)  # first: what changes from here on is seen
        if now is not None and now == before:
            return cpu.unchanged((), (), *self._others, self._stood_in)
        same = cpu.unchanged(self._entries, self._sizes, *self._others, self._stood_in)
        self._versions = now if same else None
        return same


class Watch(Watched):
    """A module as it is now, some of whose parts may be packed `FrozenLinear`s.

    Of all parts: classes, their ``forward`` and what it names in its own file, attributes by identity, parameters,
    buffers and children by identity, and whether weights are packed as they were. Hooks of parts count as a change;
    those of the module itself do not, as it is called through them.

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
            # The module's own dictionary holds whoever watches it: a circle, but for a weak reference.
            place: Any = weakref.ref(module) if part is module else held
            kinds += (place, type(part), None) if part is module else (part, type(part), held)
            sizes += (place, len(held))
            groups = _GROUPS
            if isinstance(part, FrozenLinear):  # computes with its weight and bias alone
                packed = part.packed()
                entries += (held, "panels", part.panels if packed is None else weakref.ref(packed))
                stand_ins += () if packed is None else (part._parameters["weight"],)
                groups = _GROUPS[:1]
            else:
                for name, value in held.items():
                    if name not in INNER and not (part is module and name == "forward"):
                        entries += (place, name, value)
            for name in groups if part is module else (*groups, *HOOKS):
                entries += (place, name, held[name])
                sizes += (held[name], len(held[name]))
                for key, value in held[name].items():
                    entries += (held[name], key, value)
        for place, name, value in _outside(module):
            entries += (place, name, value)
            for table in _tables(value):  # whole: a name that one of them gains comes before the other's
                sizes += (table, len(table))
                for key, attention in table.items():
                    entries += (table, key, attention)
        classes = [item for kind, name, value in _functions(module) for item in (kind, name, value)]
        super().__init__(entries, sizes, kinds, classes, stand_ins)


def as_written(module: nn.Module) -> bool:
    """Whether the functions of all its classes are theirs; others, put in their place, may want to see every call."""
    return all(is_own(kind, function) for kind, _, function in _functions(module))


def is_own(kind: type, function: Any) -> bool:
    """Whether a function and what it wraps are of torch, or of the package that its class is of."""
    rooms = {"torch", "recmas_kernels", kind.__module__.partition(".")[0]}
    while isinstance(function, FunctionType) and function.__globals__["__name__"].partition(".")[0] in rooms:
        if "__wrapped__" not in function.__dict__:
            return True
        function = function.__dict__["__wrapped__"]
    return False


def _functions(module: nn.Module) -> Iterator[tuple[type, str, Any]]:
    """Functions that the classes of all parts define, themselves or by bases that are not torch's; and their calls."""
    for kind in {type(part): None for part in module.modules()}:
        yield from ((kind, name, getattr(kind, name)) for name in (*CALLS, "forward"))
        own = [
            base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins", "recmas_kernels."))
        ]
        for name in {name: None for base in own for name in vars(base)}:
            if isinstance(value := getattr(kind, name), FunctionType) and name not in (*CALLS, "forward"):
                yield kind, name, value


def _outside(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """What results depend on outside of the module: functions that its classes name, and the attention chosen."""
    found = {}
    for kind, _, function in _functions(module):
        if not kind.__module__.startswith(_LEFT_OUT):
            for place, name in names_of(function):
                found[id(place), name] = place, name
    for config in [value for part in module.modules() for value in part.__dict__.values()]:
        held = getattr(config, "__dict__", {})
        if _IMPLEMENTATION in held:
            yield held, _IMPLEMENTATION, held[_IMPLEMENTATION]
    for place, name in found.values():
        yield place, name, place[name]


def _tables(value: Any) -> list[dict[str, Any]]:
    """Where transformers finds an attention by its name, if this is such a thing."""
    return [table for name in _TABLES if isinstance(table := getattr(value, name, None), dict)]


def names_of(function: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Names of its own file that a function uses, and that the functions there use: where they stand, and the name."""
    yield from _names(inspect.unwrap(function), set())


def _names(function: Any, seen: set[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    place = function.__globals__
    for name in function.__code__.co_names:
        value = place.get(name)
        if value is None or isinstance(value, ModuleType | type):
            continue
        yield place, name
        inner = inspect.unwrap(value) if isinstance(value, FunctionType) else None
        if inner is not None and inner.__globals__ is place:
            yield from _names(inner, seen)
