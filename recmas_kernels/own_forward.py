"""A kernel in a module's ``forward``, for as long as somebody wants it and the module computes what was recognised."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class OwnForward(ABC):
    """The ``forward`` of one module: a kernel where it serves the call, else what its class says.

    Copies and pickles of the module run as its class says.

    It holds its module weakly, so that a model which nobody holds any more gives its memory back at once.

    Args:
        module: whose ``forward`` it becomes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.owners = weakref.ref(module), 1

    @property
    def module(self) -> nn.Module:
        """Whose ``forward`` this is."""
        module = self._module()
        assert module is not None, "the module is called, so it is there"
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the class's, for those who ask which arguments a model takes."""
        return inspect.signature(_of_class(self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_class, (self.module,)

    @abstractmethod
    def look(self) -> bool:
        """Find out what the module computes as it is now; whether the kernel does the same."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def serve(module: nn.Module, make: Callable[[nn.Module], OwnForward]) -> bool:
    """Have a module run as the kernel that ``make`` makes for it, until as many `release`; whether it does."""
    present = module.__dict__.get("forward")
    if isinstance(present, OwnForward):
        present.owners += 1
        return True
    if _of_itself(module, present):
        del module.__dict__["forward"]
    elif present is not None:
        return False
    module.__dict__["forward"] = kernel = make(module)
    serves = False
    try:
        serves = kernel.look()
    finally:
        if not serves:
            del module.__dict__["forward"]
    return serves


def release(module: nn.Module) -> None:
    """Undo one `serve`: the last has the module run as its class says. Another ``forward`` set since stays."""
    present = module.__dict__.get("forward")
    if isinstance(present, OwnForward):
        present.owners -= 1
        if present.owners == 0:
            del module.__dict__["forward"]


def _of_class(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _of_itself(module: nn.Module, forward: Any) -> bool:
    """Whether a ``forward`` in an instance is its class's, as in copies of served modules."""
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward
