"""The compiled module ``_cpu``: whether it can be used here, with which instruction set, on tensors of which dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from recmas_kernels.backends import native, settings

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # csrc/link.h, enum Isa
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype
DEVICE = torch.device("cpu")  # named in every allocation: the default device may be another


@cache
def kernels() -> ModuleType:
    """The compiled module itself; an ImportError says why there is none."""
    return native.load("cpu")


@cache
def unavailable() -> str | None:
    """Why no CPU tensor can be served; None if it can. Found out once, then remembered."""
    try:
        kernels()
    except ImportError as error:
        return f"{error} (python -m recmas_kernels.info says why)"
    return None


@cache
def isa_in_use() -> int:
    """The instruction set in use: the processor's best, or a lower one named by RECMAS_CPU_ISA."""
    best = kernels().best_isa()
    name = settings.cpu_isa()
    if name is None:
        return best
    if name not in ISAS:
        raise ValueError(f"RECMAS_CPU_ISA is {name!r}, expected one of {', '.join(ISAS)}")
    if ISAS.index(name) > best:
        raise ValueError(f"RECMAS_CPU_ISA is {name!r}, but the best that this processor and build have is {ISAS[best]}")
    return ISAS.index(name)


def instruction_set() -> tuple[str, str]:
    """``(name, reason)`` of the kernels in use."""
    if settings.cpu_isa() is not None:
        return ISAS[isa_in_use()], "asked for by RECMAS_CPU_ISA"
    return ISAS[isa_in_use()], "the best that this processor and build have"


def library() -> str | None:
    """What multiplies large fp32 matrices in the kernels' place (csrc/cpu/library.h); None if nothing does."""
    return "MKL, as loaded by torch" if ISAS[isa_in_use()] == "amx" and kernels().multiplies_by_library() else None


@contextmanager
def fresh_scratch() -> Iterator[None]:
    """Within, each call gets scratch memory of its own: none is kept for the next."""
    if unavailable() is not None:
        yield
        return
    kept = kernels().keep_scratch(0)
    try:
        yield
    finally:
        kernels().keep_scratch(kept)


def reads(dtype: torch.dtype) -> bool:
    """Whether the kernels read tensors of a dtype."""
    return dtype in DTYPES
