"""The compiled CUDA kernels: which calls they take, allocation, and the native calls on torch's current stream.

The only caller of ``_cuda``, which has the handoff and the link's forward over few tokens. Other calls are declined,
and the next backend in the table serves them.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from recmas_kernels.backends import native
from recmas_kernels.backends.call import Call
from recmas_kernels.reference import LinkArguments

OLDEST_CAPABILITY = (8, 0)  # sm_80 is the oldest code in the module
_HANDOFF = ("handoff_fwd", "handoff_", "handoff_bwd")
_LINK = ("link_fwd", "link_fwd_train")
MOST_TOKENS = 32  # csrc/link.h, most_link_tokens
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/link.h, enum Dtype
_RESIDUALS = {"none": 0, "identity": 1, "linear": 2}
_GELUS = {"none": 0, "tanh": 1}


@cache
def _native() -> ModuleType:
    return native.load("cuda")


@cache
def unavailable() -> str | None:
    """Why no CUDA tensor can be served on this machine; None if it can. Found out once, then remembered."""
    try:
        module = _native()
    except ImportError as error:
        return f"{error} (python -m recmas_kernels.info says why)"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the module for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # A runtime works on older drivers of the same major version, never on an older major one.
    driver, toolkit = module.driver_version(), module.toolkit_version
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
    if call.op in _HANDOFF:
        return None
    if call.op not in _LINK:
        return f"the CUDA module has no {call.op}; it has the handoff and the link's forward"
    if call.dtype not in _DTYPES:
        return f"the kernels have no {str(call.dtype).removeprefix('torch.')}"
    if call.tokens > MOST_TOKENS:
        return f"{call.tokens} tokens: its link kernels stream the weights past {MOST_TOKENS} at most"
    if 0 in (call.in_features, call.hidden_features, call.out_features):
        return "a size is 0"
    return None


def describe(call: Call) -> str:
    """What decides a served call's speed, for `explain`: dtype, device, driver, and how wide weights are copied."""
    major, minor = torch.cuda.get_device_capability()
    driver = _version(_native().driver_version())
    facts = f"{str(call.dtype).removeprefix('torch.')} on sm_{major}{minor}, driver for CUDA {driver}"
    if call.op not in _LINK:
        return facts
    element = call.dtype.itemsize
    widths = {"w1": call.in_features * element, "w2": call.hidden_features * element}
    copies = (f"{name} by {_copied(row_bytes, element)} bytes" for name, row_bytes in widths.items())
    return f"{facts}; {', '.join(copies)} if stored in that dtype from an aligned address"


def _copied(row_bytes: int, element: int) -> int:
    """Bytes that one copy of a weight moves, as ``copy_word`` in csrc/cuda/link_plan.h has it."""
    return next((width for width in (16, 4) if row_bytes % width == 0), element)


def _rows(tensor: Tensor) -> Tensor:
    """Rows that the kernels can read: fp32, bf16 or fp16, contiguous along the last dimension."""
    if tensor.dtype not in _DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _matrix(weight: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """A weight matrix in the compute dtype; a master of another dtype is cast by torch, in a pass of its own."""
    return None if weight is None else weight.to(compute).contiguous()


def _vector(vector: Tensor | None) -> Tensor | None:
    if vector is not None and vector.dtype not in _DTYPES:
        vector = vector.to(torch.float32)
    return vector if vector is None else vector.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)
def _workspace_bytes(sizes: tuple[int, int, int, int], compute: int, norm_in: bool, norm_out: bool) -> int:
    return _native().link_forward_workspace(sizes, compute, norm_in, norm_out)


def _forward(arguments: LinkArguments, pre: Tensor | None, z: Tensor | None, stats: Tensor | None) -> Tensor:
    """y; ``pre``, ``z`` and ``stats`` are filled for the backward pass, where they are given."""
    x, w1, b1, w2, b2, w3, b3, gain_in, bias_in, gain_out, bias_out, residual, gelu, eps, dtype = arguments
    rows = _rows(x)
    sizes = (x.shape[0], x.shape[1], w1.shape[0], w2.shape[0])
    y = torch.empty(sizes[0], sizes[3], dtype=rows.dtype, device=x.device)
    if sizes[0] == 0:
        return y.to(x.dtype)
    matrices = [_matrix(weight, dtype) for weight in (w1, w2, w3)]
    vectors = [_vector(vector) for vector in (b1, b2, b3, gain_in, bias_in, gain_out, bias_out)]
    workspace_bytes = _workspace_bytes(sizes, _DTYPES[dtype], gain_in is not None, gain_out is not None)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)
    with torch.cuda.device(x.device):
        _native().link_forward(
            sizes,
            _DTYPES[dtype],
            _RESIDUALS[residual],
            _GELUS[gelu],
            eps,
            rows.data_ptr(),
            rows.stride(0),
            _DTYPES[rows.dtype],
            [_address(matrix) for matrix in matrices],
            [(0, 0) if vector is None else (vector.data_ptr(), _DTYPES[vector.dtype]) for vector in vectors],
            (y.data_ptr(), _address(pre), _address(z), _address(stats)),
            workspace.data_ptr(),
            workspace_bytes,
            x.device.index,
            torch.cuda.current_stream().cuda_stream,
        )
    return y.to(x.dtype)


def link_fwd(arguments: LinkArguments) -> Tensor:
    """y ``[T, out]`` in x's dtype; weights are read as they are stored, so there is nothing to pack."""
    return _forward(arguments, None, None, None)


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre [T, hidden], z [T, out] or [0], stats [4, T])``; pre and z in the compute dtype, stats fp32."""
    x, w1, w2, dtype = arguments.x, arguments.w1, arguments.w2, arguments.dtype
    has_norm_out, tokens = arguments.norm_out_weight is not None, x.shape[0]
    pre = torch.empty(tokens, w1.shape[0], dtype=dtype, device=x.device)
    z = torch.empty((tokens, w2.shape[0]) if has_norm_out else (0,), dtype=dtype, device=x.device)
    stats = torch.zeros(4, tokens, dtype=torch.float32, device=x.device)
    y = _forward(arguments, pre, z if has_norm_out else None, stats)
    return y, pre, z, stats


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
