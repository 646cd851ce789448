"""The compiled CPU kernels: which calls they take, allocation, and the pointer calls.

The only caller of ``_cpu``. Importing torch first is not a detail: the module then shares torch's OpenMP runtime.
"""

from __future__ import annotations

import importlib
import os
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from recmas_kernels.backends import Call, packing

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/link.h, enum Isa
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype
_RESIDUALS = {"none": 0, "identity": 1, "linear": 2}
_GELUS = {"none": 0, "tanh": 1}
_STORED, _STORED_PANEL_ORDER, _PACKED = 0, 1, 2  # enum Form
_LEAST_PACKED = 4096  # elements: smaller weights lie in the first-level cache, packed or not
_ABSENT = (0, 0)  # address, dtype number
_ROW_OPS = ("handoff_fwd", "handoff_", "handoff_bwd")

Parameters = tuple[
    Tensor,
    Tensor | None,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


@cache
def _native() -> ModuleType:
    return importlib.import_module("recmas_kernels._cpu")


@cache
def unavailable() -> str | None:
    """Why no CPU tensor can be served; None if it can. Asked once, then remembered."""
    try:
        _native()
    except ImportError as error:
        return f"{error} (python -m recmas_kernels.info says why)"
    return None


@cache
def _isa() -> int:
    """The instruction set in use: the processor's best, or a lower one named by RECMAS_CPU_ISA."""
    best = _native().best_isa()
    name = os.environ.get("RECMAS_CPU_ISA")
    if not name:
        return best
    if name not in ISAS:
        raise ValueError(f"RECMAS_CPU_ISA is {name!r}, expected one of {', '.join(ISAS)}")
    if ISAS.index(name) > best:
        raise ValueError(f"RECMAS_CPU_ISA is {name!r}, but the best that this processor and build have is {ISAS[best]}")
    return ISAS.index(name)


def instruction_set() -> tuple[str, str]:
    """``(name, reason)`` of the kernels in use."""
    if os.environ.get("RECMAS_CPU_ISA"):
        return ISAS[_isa()], "asked for by RECMAS_CPU_ISA"
    return ISAS[_isa()], "the best that this processor and build have"


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    if call.op in _ROW_OPS:
        return None
    if call.dtype not in _DTYPES:
        return f"the kernels have no {str(call.dtype).removeprefix('torch.')}"
    if call.op != "alignment_fwd" and 0 in (call.in_features, call.hidden_features, call.out_features):
        return "a size is 0"
    return None


def _served(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """A weight matrix the kernels can read: contiguous, in fp32 or the compute dtype."""
    if tensor.dtype is not compute and tensor.dtype is not torch.float32:
        tensor = tensor.to(compute)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _readable(tensor: Tensor) -> Tensor:
    """A bias or gain the kernels can read: contiguous, in fp32, bf16 or fp16."""
    if tensor.dtype not in _DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _vector(vector: Tensor | None, kept: list[Tensor]) -> tuple[int, int]:
    """Address and dtype number of a bias or gain; a converted one is added to ``kept``, to live as long as the call."""
    if vector is None:
        return _ABSENT
    number = _DTYPES.get(vector.dtype)
    if number is None or not vector.is_contiguous():
        vector = _readable(vector)
        kept.append(vector)
        number = _DTYPES[vector.dtype]
    return vector.data_ptr(), number


def _address(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype number; (0, 0) if absent. The caller keeps the tensor alive."""
    return _ABSENT if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype])


def _rows(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@lru_cache(maxsize=4096)
def _forward_workspace(*sizes: int) -> int:
    return _native().link_forward_workspace(*sizes)


def _weight(
    weight: Tensor | None, compute: torch.dtype, isa: int, may_pack: bool
) -> tuple[Tensor | None, int, int, int]:
    """``(tensor to keep alive, address, dtype number, form)`` of a weight matrix."""
    if weight is None:
        return None, 0, 0, _STORED
    form = _STORED
    if may_pack and weight.numel() >= _LEAST_PACKED and weight.dtype in _DTYPES and packing.packable(weight):
        packed = packing.lookup(_native(), weight, (compute, isa), _pack)
        if packed is not None:
            return packed, packed.data_ptr(), 0, _PACKED
        form = _STORED_PANEL_ORDER
    if weight.dtype is not compute or not weight.is_contiguous():
        weight = _served(weight, compute)
    return weight, weight.data_ptr(), _DTYPES[weight.dtype], form


def _pack(weight: Tensor, layout: packing.Layout) -> Tensor:
    compute, isa = layout
    (rows, columns), number = weight.shape, _DTYPES[compute]
    packed = torch.empty(_native().packed_bytes(isa, number, rows, columns), dtype=torch.uint8)
    threads, source = torch.get_num_threads(), _DTYPES[weight.dtype]
    _native().pack_weight(isa, threads, number, weight.data_ptr(), source, rows, columns, packed.data_ptr())
    return packed


def _forward(
    x: Tensor,
    parameters: Parameters,
    residual: str,
    gelu: str,
    eps: float,
    compute: torch.dtype,
    may_pack: bool,
    saved: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """y; ``saved`` (pre, z, stats) is filled for the backward pass."""
    w1, b1, w2, b2, w3, b3, gi, ci, go, co = parameters
    (tokens, in_features), hidden_features, out_features = x.shape, w1.shape[0], w2.shape[0]
    rows = _rows(x)
    y = torch.empty(tokens, out_features, dtype=rows.dtype)
    if tokens == 0:
        return y.to(x.dtype)
    isa, threads, number, kind = _isa(), torch.get_num_threads(), _DTYPES[compute], _RESIDUALS[residual]
    _kept1, *first = _weight(w1, compute, isa, may_pack)
    _kept2, *second = _weight(w2, compute, isa, may_pack)
    _kept3, *third = _weight(w3, compute, isa, may_pack)
    kept: list[Tensor] = []
    pb1, pb2, pb3 = _vector(b1, kept), _vector(b2, kept), _vector(b3, kept)
    pgi, pci, pgo, pco = _vector(gi, kept), _vector(ci, kept), _vector(go, kept), _vector(co, kept)
    narrow = (pb1[1] | pb2[1] | pb3[1] | pgi[1] | pci[1] | pgo[1] | pco[1]) != 0
    sizes = (tokens, in_features, hidden_features, out_features)
    workspace_bytes = _forward_workspace(
        isa, threads, number, kind, *sizes, gi is not None, go is not None, first[2], second[2], third[2], narrow
    )
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
    pre_z_stats = (0, 0, 0)
    if saved is not None:
        pre, z, stats = saved
        pre_z_stats = (pre.data_ptr(), z.data_ptr() if go is not None else 0, stats.data_ptr())
    _native().link_forward(
        isa,
        threads,
        number,
        kind,
        _GELUS[gelu],
        eps,
        *sizes,
        rows.data_ptr(),
        rows.stride(0),
        _DTYPES[rows.dtype],
        *first,
        *pb1,
        *second,
        *pb2,
        *third,
        *pb3,
        *pgi,
        *pci,
        *pgo,
        *pco,
        y.data_ptr(),
        *pre_z_stats,
        workspace.data_ptr(),
        workspace_bytes,
    )
    return y if y.dtype is x.dtype else y.to(x.dtype)


def link_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    gi: Tensor | None,
    ci: Tensor | None,
    go: Tensor | None,
    co: Tensor | None,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    may_pack: bool,
) -> Tensor:
    """y ``[T, out]`` in x's dtype; weights that stay what they are are packed on their second sighting."""
    parameters = (w1, b1, w2, b2, w3, b3, gi, ci, go, co)
    return _forward(x, parameters, residual, gelu, eps, dtype, may_pack, None)


def link_fwd_train(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    gi: Tensor | None,
    ci: Tensor | None,
    go: Tensor | None,
    co: Tensor | None,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre [T, hidden], z [T, out] or [0], stats [4, T])``; pre and z in the compute dtype, stats fp32."""
    parameters = (w1, b1, w2, b2, w3, b3, gi, ci, go, co)
    tokens = x.shape[0]
    pre = torch.empty(tokens, w1.shape[0], dtype=dtype)
    z = torch.empty(0, dtype=dtype) if go is None else torch.empty(tokens, w2.shape[0], dtype=dtype)
    # The kernel writes the rows of the norms that exist.
    allocate = torch.zeros if gi is None or go is None else torch.empty
    stats = allocate(4, tokens, dtype=torch.float32)
    y = _forward(x, parameters, residual, gelu, eps, dtype, False, (pre, z, stats))
    return y, pre, z, stats


def link_bwd(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    z: Tensor,
    stats: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    gi: Tensor | None,
    ci: Tensor | None,
    go: Tensor | None,
    co: Tensor | None,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of ``(x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)``; ``[0]`` where ``needs`` is False."""
    inputs = (x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)
    tokens, in_features = x.shape
    grads = tuple(
        # The kernels write fp32, bf16 and fp16; a gradient of another dtype leaves through fp32.
        torch.empty(tensor.shape, dtype=tensor.dtype if tensor.dtype in _DTYPES else torch.float32)
        if need and tensor is not None
        else torch.empty(0, dtype=x.dtype)
        for need, tensor in zip(needs, inputs, strict=True)
    )
    if tokens == 0:
        return tuple(grad.zero_() for grad in grads)
    rows, incoming = _rows(x), _rows(dy)
    kept = [t if t is None else _served(t, dtype) if t.dim() == 2 else _readable(t) for t in inputs[1:]]
    parameters = [_address(tensor) for tensor in kept]
    outputs = [_address(grad) if grad.numel() else _ABSENT for grad in grads]
    setting = (_isa(), torch.get_num_threads(), _DTYPES[dtype], _RESIDUALS[residual])
    sizes = (tokens, in_features, w1.shape[0], w2.shape[0])
    workspace_bytes = _native().link_backward_workspace(*setting, *sizes, parameters, outputs)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
    pre, z, stats = pre.contiguous(), z.contiguous(), stats.contiguous()
    _native().link_backward(
        *setting,
        _GELUS[gelu],
        eps,
        *sizes,
        incoming.data_ptr(),
        incoming.stride(0),
        _DTYPES[incoming.dtype],
        rows.data_ptr(),
        rows.stride(0),
        _DTYPES[rows.dtype],
        pre.data_ptr(),
        pre.stride(0),
        z.data_ptr(),
        w2.shape[0],
        stats.data_ptr(),
        parameters,
        outputs,
        workspace.data_ptr(),
        workspace_bytes,
    )
    return tuple(
        grad if tensor is None or not need else grad.to(tensor.dtype)
        for grad, need, tensor in zip(grads, needs, inputs, strict=True)
    )


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]``, slot_rows int64 unique."""
    if embeds.shape[1] > 1 and embeds.stride(1) != 1:
        raise ValueError(f"embeds have stride {embeds.stride(1)} between elements, expected 1")
    rows = rows.to(embeds.dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    slots, size = slot_rows.contiguous(), embeds.element_size()
    _native().handoff_scatter(
        rows.data_ptr(),
        rows.stride(0) * size,
        slots.data_ptr(),
        rows.shape[0],
        rows.shape[1] * size,
        embeds.data_ptr(),
        embeds.stride(0) * size,
        embeds.shape[0],
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
    row_bytes = dy.shape[1] * dy.element_size()
    _native().handoff_take(
        dembeds.data_ptr(),
        row_bytes,
        dy.shape[0],
        slots.data_ptr(),
        slots.shape[0],
        row_bytes,
        drows.data_ptr(),
    )
    return drows, dembeds


def alignment_fwd(
    pred: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    """``(loss fp32 scalar, gradient [T, d] in pred's dtype)``; the formula stands in ``reference.alignment_fwd``."""
    tokens, features = pred.shape
    loss = torch.zeros((), dtype=torch.float32)
    grad = torch.empty(tokens, features, dtype=pred.dtype)
    if grad.numel() == 0:
        return loss, grad
    rows, table = _rows(pred), _rows(target)
    ids = None if token_ids is None else token_ids.contiguous()
    weights = None if mask is None else mask.to(torch.float32).contiguous()
    isa, threads = _isa(), torch.get_num_threads()
    workspace_bytes = _native().alignment_workspace(isa, threads, tokens, features)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
    _native().alignment(
        isa,
        threads,
        tokens,
        features,
        table.shape[0],
        rows.data_ptr(),
        rows.stride(0),
        _DTYPES[rows.dtype],
        table.data_ptr(),
        table.stride(0),
        _DTYPES[table.dtype],
        0 if ids is None else ids.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        cosine_weight,
        mse_weight,
        embed_scale,
        loss.data_ptr(),
        grad.data_ptr(),
        workspace.data_ptr(),
        workspace_bytes,
    )
    return loss, grad
