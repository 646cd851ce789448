"""What a model computes with, remembered, since what was computed with something else must not be used again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from recmas.copies import original, stamp
from recmas.engine.hooks import HOOKS, OF_ALL, hooked

_PARTS = ("_modules", *HOOKS)
_TENSORS = ("_parameters", "_buffers")
_OF_EVERY = frozenset(nn.Module().__dict__) - {"training", *_PARTS, *_TENSORS}
"""Attributes of every module that decide no result."""


class ModelState:
    """A model as it was when this was made.

    Remembered are, of all its modules: classes, parts, attributes and forward hooks; what lists, tuples, dictionaries
    and configurations among the attributes hold, at any depth; of parameters, buffers and other tensors there, how
    often each was written, where its elements are, and their dtype. A copy that offload made counts as its original.

    Not seen are writes that PyTorch does not count: of fused optimisers, through ``.data``, to tensors made in
    inference mode, by other processes. Nor are functions that are replaced in classes or files, what objects of other
    kinds hold, and PyTorch's own switches.

    Args:
        model: any. All that is remembered is held, elements of tensors included, so that nothing else can come to the
            same address: weights that are replaced stay in memory until the state goes.
        tensors: False leaves out which parameters and buffers there are and what was written, and holds none of them.

    Attributes:
        model: as given.
        unforeseen: why nobody can say what the model computes, so that its state never holds; empty if one can.
    """

    def __init__(self, model: nn.Module, *, tensors: bool = True) -> None:
        self.model = model
        self.unforeseen = "a part of the model has hooks" if hooked(model) else ""
        self._modules = modules = tuple(model.modules())
        self._attributes = tuple((part.__dict__, _getter(part)) for part in modules)
        places = [
            *OF_ALL,
            *_places(part.__dict__[name] for part in modules for name in part.__dict__ if _decides(name)),
        ]
        groups = [part.__dict__[name] for part in modules for name in _TENSORS]
        self._sized = (*places, *groups, *(held for held, _ in self._attributes))
        self._filled = tuple(held.values() if isinstance(held, dict) else held for held in places if held)
        self._tensors = tuple(held.values() for held in groups if held and tensors)
        self._shape, self._values = self._look(), list(self._held())
        self._beside = [value for value in self._values if isinstance(value, Tensor) and tensors]
        self._stamps = [(tensor, stamp(tensor), tensor.data) for tensor in self._written()]

    def holds(self) -> bool:
        """Whether the model is as it was."""
        try:
            if self.unforeseen or self._look() != self._shape or not all(map(is_, self._held(), self._values)):
                return False
        except KeyError:  # an attribute
            return False
        now = self._written()
        pairs = zip(now, self._stamps, strict=False)
        return len(now) == len(self._stamps) and all(
            one is then and stamp(one) == mark for one, (then, mark, _) in pairs
        )

    def _look(self) -> tuple[tuple[type, ...], tuple[int, ...]]:
        """Classes, and how much there is where."""
        return tuple(map(type, self._modules)), tuple(map(len, self._sized))

    def _held(self) -> Iterator[Any]:
        """All that is no parameter or buffer; as many as before, where `_look` is the same."""
        attributes = [get(held) for held, get in self._attributes]
        return chain(chain.from_iterable(attributes), chain.from_iterable(self._filled))

    def _written(self) -> list[Tensor]:
        """Tensors among the values; parameters and buffers."""
        kept = (original(tensor) for tensor in chain.from_iterable(self._tensors) if tensor is not None)
        return [*self._beside, *kept]


class ModelStates:
    """What models computed with when somebody last asked; one state, the same object, while nothing changed."""

    def __init__(self) -> None:
        self._latest: dict[nn.Module, ModelState] = {}

    def of(self, model: nn.Module) -> ModelState:
        """A model's state now; what only the one before held is let go."""
        known = self._latest.get(model)
        if known is None or not known.holds():
            known = self._latest[model] = ModelState(model)
        return known

    def forget(self) -> None:
        """Let go of models and of all that their states hold."""
        self._latest.clear()


def _decides(name: str) -> bool:
    """Whether a module's attribute of this name may decide a result."""
    return name not in _OF_EVERY and name not in _TENSORS


def _getter(module: nn.Module) -> itemgetter[Any]:
    """Gets all attributes of a module that may decide a result, and where its tensors are."""
    return itemgetter(*(name for name in module.__dict__ if name not in _OF_EVERY))


def _places(values: Iterable[Any]) -> list[Any]:
    """Dictionaries, lists and tuples among values, and in each other."""
    found: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        inner = value.__dict__ if isinstance(value, PreTrainedConfig) else value
        if isinstance(inner, dict | list | tuple) and id(inner) not in found:
            found[id(inner)] = inner
            left += inner.values() if isinstance(inner, dict) else inner
    return list(found.values())
