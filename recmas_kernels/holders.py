"""Who holds a weight besides the model whose layers are packed: packing would leave that holder nothing but NaN."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def held_outside(model: nn.Module, linears: Iterable[nn.Linear]) -> set[int]:
    """The ids of those weights that modules outside of ``model`` hold, too, or may hold.

    ``gc.freeze`` hides from the collector, and so from this, whatever existed before it. After it a weight with a
    reference that nothing visible accounts for counts as held outside; a local variable is such a reference.
    """
    weights = [part._parameters["weight"] for part in linears if part._parameters.get("weight") is not None]
    inside = {id(part._parameters): part._parameters for part in model.modules()}
    # Whatever is frozen, what the interpreter began with is, too. To count what is frozen would take 40 ms.
    began_with = vars(sys)
    holders = gc.get_referrers(*weights, sys.modules)
    frozen = not any(held is began_with for held in holders)
    wanted = set(map(id, weights))
    found: set[int] = set()
    for held in holders:
        if type(held) is dict and id(held) not in inside:
            here = wanted.intersection(map(id, held.values()))
            if here and (frozen or _is_of_a_module(held)):
                found |= here
    if frozen:
        seen = {id(held): held for held in (*holders, *inside.values())}
        found.update(_with_others(weights, seen))
    return found


def _is_of_a_module(parameters: dict[str, Any]) -> bool:
    for owner in gc.get_referrers(parameters):
        attributes = owner if type(owner) is dict else owner.__dict__ if issubclass(type(owner), nn.Module) else {}
        if attributes.get("_parameters") is parameters:
            return True
    return False


def _with_others(weights: Sequence[Tensor | None], holders: Mapping[int, object]) -> set[int]:
    """The ids of those weights with more references than ``holders`` have."""
    known = Counter(map(id, gc.get_referents(*holders.values())))
    counted = [*weights, object()]  # the last one shows what counting itself holds
    *others, own = [sys.getrefcount(each) - known[id(each)] for each in counted]
    return {id(weight) for weight, count in zip(weights, others, strict=True) if count > own}
