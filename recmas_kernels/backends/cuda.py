"""The compiled CUDA kernels: allocation and the pointer call, on torch's current stream.

The only caller of ``_cuda``. That module holds the handoff; the link's ops are declined, and the next backend in
the table serves them.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from recmas_kernels.backends import Call

OLDEST_CAPABILITY = (8, 0)  # sm_80 is the oldest code in the module
_HANDOFF = ("handoff_fwd", "handoff_", "handoff_bwd")


@cache
def _native() -> ModuleType:
    return importlib.import_module("recmas_kernels._cuda")


@cache
def unavailable() -> str | None:
    """Why no CUDA tensor can be served on this machine; None if it can. Asked once, then remembered."""
    try:
        native = _native()
    except ImportError as error:
        return f"{error} (python -m recmas_kernels.info says why)"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the module for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # A runtime works on older drivers of the same major version, never on an older major one.
    driver, toolkit = native.driver_version(), native.toolkit_version
    if driver // 1000 < toolkit // 1000:
        return f"the driver serves CUDA {_version(driver)}, the module was built with CUDA {_version(toolkit)}"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"cuda:{device} has compute capability {capability[0]}.{capability[1]}, expected 8.0 or more"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    return None if call.op in _HANDOFF else f"the CUDA module has no {call.op}; it holds the handoff"


def _row_bytes(rows: Tensor) -> tuple[int, int]:
    """Bytes from one row to the next, and of one row; the last dimension must be contiguous."""
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"rows have stride {rows.stride(1)} between elements, expected 1")
    return rows.stride(0) * rows.element_size(), rows.shape[1] * rows.element_size()


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]`` of their dtype."""
    slots = slot_rows.contiguous()
    rows_stride, row_bytes = _row_bytes(rows)
    table_stride, _ = _row_bytes(embeds)
    with torch.cuda.device(embeds.device):
        _native().handoff_scatter(
            rows.data_ptr(),
            rows_stride,
            slots.data_ptr(),
            slots.shape[0],
            row_bytes,
            embeds.data_ptr(),
            table_stride,
            embeds.shape[0],
            embeds.device.index,
            torch.cuda.current_stream().cuda_stream,
        )


def handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    """A copy of embeds ``[R, d]`` with ``copy[slot_rows[i]] = rows[i]``."""
    out = embeds.clone(memory_format=torch.contiguous_format)
    handoff_(rows, out, slot_rows)
    return out


def handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(drows [n, d], dembeds [R, d])``: the slot rows of dy, and dy with those rows zeroed."""
    slots = slot_rows.contiguous()
    dembeds = dy.clone(memory_format=torch.contiguous_format)
    drows = dy.new_empty(slots.shape[0], dy.shape[1])
    table_stride, row_bytes = _row_bytes(dembeds)
    with torch.cuda.device(dy.device):
        _native().handoff_take(
            dembeds.data_ptr(),
            table_stride,
            dembeds.shape[0],
            slots.data_ptr(),
            slots.shape[0],
            row_bytes,
            drows.data_ptr(),
            dy.device.index,
            torch.cuda.current_stream().cuda_stream,
        )
    return drows, dembeds
