"""The compiled CPU kernels: which calls they take, allocation, and the native calls.

The only caller of ``_cpu``. Importing torch first is not a detail: the module then shares torch's OpenMP runtime.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from recmas_kernels.backends import Call, native, packing

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/link.h, enum Isa
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype
_RESIDUALS = {"none": 0, "identity": 1, "linear": 2}
_GELUS = {"none": 0, "tanh": 1}
_LEAST_PACKED = 4096  # elements: smaller weights lie in the first-level cache, packed or not
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
    module = native.load("cpu")
    module.connect(torch, getattr(Tensor, "__dlpack_c_exchange_api__", None))
    return module


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
    return tensor.contiguous()


def _readable(tensor: Tensor) -> Tensor:
    """A bias or gain the kernels can read: contiguous, in fp32, bf16 or fp16."""
    return (tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _all_readable(parameters: Parameters, compute: torch.dtype) -> Parameters:
    return tuple(  # type: ignore[return-value]
        t if t is None else _served(t, compute) if t.dim() == 2 else _readable(t) for t in parameters
    )


def is_plain_link(residual: str, mixed: bool, *tensors: Tensor | None) -> bool:
    """Whether x and the ten parameters are plain tensors that fit each other and need no conversion, on any device.

    One native look at all of them (0.4 us); False also means "look closely". ``mixed`` allows parameters of another
    floating-point dtype than x's, as under autocast.
    """
    return unavailable() is None and _native().link_is_plain(residual, mixed, *tensors)


def _form(weight: Tensor | None, compute: torch.dtype, isa: int) -> Tensor | bool:
    """How a weight matrix that may be packed is read: its panels; or, until it has them, whether in their order."""
    if weight is None or weight.numel() < _LEAST_PACKED or weight.dtype not in _DTYPES or not packing.packable(weight):
        return False
    panels = packing.lookup(_native(), weight, (compute, isa), _pack)
    return True if panels is None else panels


def _pack(weight: Tensor, layout: packing.Layout) -> Tensor:
    compute, isa = layout
    panels = torch.empty(_native().packed_bytes(isa, _DTYPES[compute], *weight.shape), dtype=torch.uint8)
    _native().pack_weight(isa, torch.get_num_threads(), _DTYPES[compute], weight, panels)
    return panels


def _forward(
    x: Tensor,
    parameters: Parameters,
    residual: str,
    gelu: str,
    eps: float,
    compute: torch.dtype,
    may_pack: bool,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """y; ``saved`` (pre, z, stats) is filled for the backward pass."""
    w1, _, w2, _, w3 = parameters[:5]
    isa, tokens, out_features = _isa(), x.shape[0], w2.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype)
    if tokens == 0:
        return y
    settings = (isa, torch.get_num_threads(), _DTYPES[compute], _RESIDUALS[residual], _GELUS[gelu], eps)
    forms: tuple[Tensor | bool, ...] = (False, False, False)
    if may_pack:
        forms = (_form(w1, compute, isa), _form(w2, compute, isa), _form(w3, compute, isa))
    if _native().link_forward(*settings, x, *parameters, *forms, y, *saved):
        return y
    rows, parameters = _rows(x), _all_readable(parameters, compute)
    converted = torch.empty(tokens, out_features, dtype=rows.dtype)
    if not _native().link_forward(*settings, rows, *parameters, *forms, converted, *saved):
        raise AssertionError("converted tensors are readable")
    return converted.to(x.dtype)


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
    return _forward(x, parameters, residual, gelu, eps, dtype, may_pack, (None, None, None))


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
    y = _forward(x, parameters, residual, gelu, eps, dtype, False, (pre, None if go is None else z, stats))
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
    # The kernels write fp32, bf16 and fp16; a gradient of another dtype leaves through fp32.
    outputs = [
        torch.empty(tensor.shape, dtype=tensor.dtype if tensor.dtype in _DTYPES else torch.float32)
        if need and tensor is not None
        else None
        for need, tensor in zip(needs, inputs, strict=True)
    ]
    if x.shape[0] == 0:
        outputs = [None if grad is None else grad.zero_() for grad in outputs]
    else:
        settings = (_isa(), torch.get_num_threads(), _DTYPES[dtype], _RESIDUALS[residual], _GELUS[gelu], eps)
        kept: tuple[Tensor | None, ...] = (dy, x, pre, None if go is None else z, stats, *inputs[1:])
        if not _native().link_backward(*settings, *kept, *outputs):
            parameters = _all_readable((w1, b1, w2, b2, w3, b3, gi, ci, go, co), dtype)
            rows = (_rows(dy), _rows(x), _rows(pre), None if go is None else _rows(z), stats.contiguous())
            if not _native().link_backward(*settings, *rows, *parameters, *outputs):
                raise AssertionError("converted tensors are readable")
    return tuple(
        x.new_empty(0)
        if grad is None or tensor is None
        else grad
        if grad.dtype is tensor.dtype
        else grad.to(tensor.dtype)
        for grad, tensor in zip(outputs, inputs, strict=True)
    )


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]``, slot_rows int64 unique."""
    if embeds.shape[1] > 1 and embeds.stride(1) != 1:
        raise ValueError(f"embeds have stride {embeds.stride(1)} between elements, expected 1")
    rows = rows.to(embeds.dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _native().handoff_scatter(rows, slot_rows.contiguous(), embeds, embeds.element_size())


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
    _native().handoff_take(dembeds, slots, drows, dy.element_size())
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
    settings = (_isa(), torch.get_num_threads())
    _native().alignment(*settings, rows, table, ids, weights, cosine_weight, mse_weight, embed_scale, loss, grad)
    return loss, grad
