"""Triton kernels for CUDA and ROCm devices: links over many tokens, and the alignment loss.

One file per kernel family: ``rows`` (LayerNorm and the residual), ``activation`` (GELU), ``small_hidden`` (the whole
link in one kernel), ``library`` (torch's own products), ``alignment``; ``link`` calls them in the order that ``plan``
chooses. A handoff is torch's own copies of rows: a kernel would move the same bytes in as many launches. Nothing is
imported or compiled before the first call that needs it.
"""

from __future__ import annotations

import importlib
import subprocess
from functools import cache
from typing import Any

import torch

from recmas_kernels.backends.call import Call
from recmas_kernels.reference import handoff_, handoff_bwd, handoff_fwd

__all__ = ["handoff_", "handoff_bwd", "handoff_fwd"]

OLDEST_TRITON = (3, 5)
OLDEST_CAPABILITY = (8, 0)
WIDEST_ROW = 8192  # a row lives in the registers of one program; wider ones spill in the norm's backward
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAMILIES = {
    "link_fwd": "link",
    "link_fwd_train": "link",
    "link_bwd": "link",
    "alignment_fwd": "alignment",
    "alignment_bwd": "alignment",
}


def __getattr__(name: str) -> Any:
    """The op functions, each imported with its family on first use: without triton this module still imports."""
    if name not in _FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_FAMILIES[name]}"), name)
    globals()[name] = function
    return function


@cache
def unavailable() -> str | None:
    """Why no tensor can be served on this machine; None if it can. Found out once, then remembered."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton is {triton.__version__}, expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None:
        for device in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(device)
            if capability < OLDEST_CAPABILITY:
                return f"cuda:{device} has compute capability {capability[0]}.{capability[1]}, expected 8.0 or more"
    try:
        triton.runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        # Triton builds its launcher on first use: a machine with a driver may still lack what that takes.
        return f"triton cannot start its driver, which takes a C compiler and Python's headers ({error})"
    return None


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    if call.op.startswith("handoff"):
        return None  # a handoff moves bytes: any dtype, any width
    if call.dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {call.dtype}"
    widest = max(call.in_features, call.out_features)
    if widest > WIDEST_ROW:
        return f"its row kernels hold up to {WIDEST_ROW} features, got {widest}"
    if min(call.in_features, call.out_features) == 0 or (call.op.startswith("link") and call.hidden_features == 0):
        return "a size is zero"
    return None


def variants(call: Call, residual: str, device: torch.device) -> list[str]:
    """How a link's ``call`` that is not declined would be served on the device, a line for each variant."""
    from recmas_kernels.backends.triton import plan

    sizes = (call.tokens, call.in_features, call.hidden_features, call.out_features)
    return plan.describe(plan.Link(device, call.dtype, *sizes, residual))
