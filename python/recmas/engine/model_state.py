"""What a model computes with, remembered, since what was computed with something else must not be used again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from transformers import PreTrainedConfig

from recmas.copies import original, version

_PARTS = ("_modules", "_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_OF_EVERY = frozenset(nn.Module().__dict__) - {"training", *_PARTS, *_TENSORS}
"""Attributes of every module that decide no result."""
_HOOKS = of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks


class ModelState:
    """A model as it was when this was made.

    Remembered are, of all its modules: classes, parts, attributes and forward hooks; what attributes hold that are
    lists, dictionaries or configurations; parameters and buffers; and how often each tensor was written. A copy that
    offload made counts as its original.

    Not seen are writes that PyTorch does not count: through ``.data``, to tensors made in inference mode, by other
    processes. Nor are functions that are replaced in classes or files, what objects of other kinds hold, and PyTorch's
    own switches.

    Args:
        model: any. Its parameters and buffers are held weakly.

    Attributes:
        model: as given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = modules = tuple(model.modules())
        self._attributes = tuple((part.__dict__, _getter(part)) for part in modules)
        places = [*_HOOKS, *_places(modules)]
        tensors = [part.__dict__[name] for part in modules for name in _TENSORS]
        self._sized = (*places, *tensors, *(held for held, _ in self._attributes))
        self._filled = tuple(held.values() if isinstance(held, dict) else held for held in places if held)
        self._tensors = tuple(held.values() for held in tensors if held)
        self._seen = self._look()
        values = {id(value): value for value in self._values()}.values()
        self._kept, self._weakly = _referenced(values)
        beside = (value for value in values if isinstance(value, Tensor))
        self._beside = [(weakref.ref(tensor), version(tensor)) for tensor in beside]
        self._written = [(weakref.ref(tensor), version(tensor)) for tensor in self._originals()]

    def holds(self, *, tensors: bool = True) -> bool:
        """Whether the model is as it was; without `tensors` parameters and buffers may be others, or written."""
        try:
            if self._look() != self._seen or any(held() is None for held in self._weakly):
                return False  # what is there no more, something else may have its address
        except KeyError:  # an attribute
            return False
        if not tensors:
            return True
        now = [*(tensor for held, _ in self._beside if (tensor := held()) is not None), *self._originals()]
        known = [*self._beside, *self._written]
        pairs = zip(known, now, strict=False)
        return len(now) == len(known) and all(then() is one and count == version(one) for (then, count), one in pairs)

    def _look(self) -> tuple[Any, ...]:
        """Classes, sizes and addresses of all that is no parameter or buffer."""
        sizes = tuple(map(len, self._sized))
        return tuple(map(type, self._modules)), sizes, tuple(map(id, self._values()))

    def _values(self) -> Iterator[Any]:
        attributes = [get(held) for held, get in self._attributes]
        return chain(chain.from_iterable(attributes), chain.from_iterable(self._filled))

    def _originals(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [original(tensor) for tensor in chain.from_iterable(self._tensors) if tensor is not None]


class ModelStates:
    """What models computed with when somebody last asked; one state, the same object, while nothing changed."""

    def __init__(self) -> None:
        self._latest: dict[nn.Module, ModelState] = {}

    def of(self, model: nn.Module) -> ModelState:
        """A model's state now."""
        known = self._latest.get(model)
        if known is None or not known.holds():
            known = self._latest[model] = ModelState(model)
        return known


def _getter(module: nn.Module) -> itemgetter[Any]:
    """Gets all attributes of a module that may decide a result."""
    return itemgetter(*(name for name in module.__dict__ if name not in _OF_EVERY))


def _places(modules: Iterable[nn.Module]) -> list[Any]:
    """Dictionaries and lists that modules have as attributes, but for those of their tensors."""
    found: dict[int, Any] = {}
    for module in modules:
        for name, value in module.__dict__.items():
            inner = value.__dict__ if isinstance(value, PreTrainedConfig) else value
            if name not in _OF_EVERY and name not in _TENSORS and isinstance(inner, dict | list):
                found[id(inner)] = inner
    return list(found.values())


def _referenced(values: Iterable[Any]) -> tuple[list[Any], list[weakref.ref[Any]]]:
    """Values that cannot be held weakly, and weak references to the others."""
    kept: list[Any] = []
    weakly: list[weakref.ref[Any]] = []
    for value in values:
        try:
            weakly.append(weakref.ref(value))
        except TypeError:
            kept.append(value)
    return kept, weakly
