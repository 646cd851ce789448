"""Whether Python objects are what they were, found without running Python: for `recmas_kernels.watch`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recmas_kernels.backends.cpu.module import kernels


def stand_ins(tensors: tuple[Tensor, ...]) -> Any:
    """What `unchanged` takes, of tensors that hold one element for all."""
    return kernels().read_stand_ins(tensors)


def unchanged(*watched: Any) -> bool:
    """Whether Python objects are what they were; see `recmas_kernels.watch`."""
    same: bool = kernels().unchanged(*watched)
    return same


def versions(places: tuple[Any, ...]) -> bytes | None:
    """What says whether dictionaries were changed in between, by a comparison; None if this Python does not tell."""
    found: bytes | None = kernels().versions(places)
    return found
