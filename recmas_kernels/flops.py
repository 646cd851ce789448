"""Floating-point operations of the ops, for ``torch.utils.flop_counter``: what it counts for the eager module.

That module imports Triton, so the formulas are registered when somebody else imports it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _forward(x: _Shape, w1: _Shape, b1: Any, w2: _Shape, b2: Any, w3: _Shape | None, *_: Any, **__: Any) -> int:
    return 2 * x[0] * sum(shape[0] * shape[1] for shape in (w1, w2, w3) if shape is not None)


def _backward(dy: _Shape, x: _Shape, pre: Any, z: Any, stats: Any, *rest: Any, **_: Any) -> int:
    w1, w2, w3 = rest[0], rest[2], rest[4]
    need_x, need_w1, need_b1, need_w2, _, need_w3, _, need_gain, need_bias, *_ = rest[-1]
    one, two, three = (0 if shape is None else 2 * x[0] * shape[0] * shape[1] for shape in (w1, w2, w3))
    into_norm = need_x or need_gain or need_bias
    total = need_w1 * one + need_w2 * two + need_w3 * three + need_x * three
    total += into_norm * one + (into_norm or need_w1 or need_b1) * two
    return total + (one + two + three if pre is None else 0)


def _frozen(x: _Shape, panels: Any, bias: Any, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * out_features


def _frozen_backward(dy: _Shape, panels: Any, in_features: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * in_features


_FORMULAS = {
    "link_fwd": _forward,
    "link_fwd_train": _forward,
    "link_bwd": _backward,
    "frozen_linear": _frozen,
    "frozen_linear_bwd": _frozen_backward,
}


def _register(counter: ModuleType) -> None:
    for op, formula in _FORMULAS.items():
        counter.flop_registry[getattr(torch.ops.recmas, op)] = counter.shape_wrapper(formula)


class _Finder(MetaPathFinder):
    """Finds the counter's module as the other finders do, and registers the formulas once it is executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the formulas with torch's counter, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
