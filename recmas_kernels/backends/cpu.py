"""The compiled CPU kernels: which calls they take, allocation, and the native calls. The only caller of ``_cpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recmas_kernels import reference
from recmas_kernels.backends import native, packing, pages, settings
from recmas_kernels.backends.call import Call
from recmas_kernels.reference import LinkArguments

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # csrc/link.h, enum Isa
_CPU = torch.device("cpu")  # named in every allocation: the default device may be another
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype
_VECTORS = ("b1", "b2", "b3", "norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")
_LEAST_PACKED = 4096  # elements: smaller weights fit into the first-level cache, packed or not
MOST_STREAMED = 16  # csrc/cpu/stream.h, kStreamLimit: beyond, stored weights are summed in panel order anyway
MOST_IN_PLACE = 2  # tokens: reading a weight where it lies was faster than laying it out, on every instruction set
_ROW_OPS = ("handoff_fwd", "handoff_", "handoff_bwd")


@cache
def _native() -> ModuleType:
    return native.load("cpu")


@cache
def unavailable() -> str | None:
    """Why no CPU tensor can be served; None if it can. Found out once, then remembered."""
    try:
        _native()
    except ImportError as error:
        return f"{error} (python -m recmas_kernels.info says why)"
    return None


@cache
def _isa() -> int:
    """The instruction set in use: the processor's best, or a lower one named by RECMAS_CPU_ISA."""
    best = _native().best_isa()
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
        return ISAS[_isa()], "asked for by RECMAS_CPU_ISA"
    return ISAS[_isa()], "the best that this processor and build have"


@contextmanager
def fresh_scratch() -> Iterator[None]:
    """Within, each call gets scratch memory of its own: none is kept for the next."""
    if unavailable() is not None:
        yield
        return
    kept = _native().keep_scratch(0)
    try:
        yield
    finally:
        _native().keep_scratch(kept)


def library() -> str | None:
    """What multiplies large fp32 matrices in the kernels' place (csrc/cpu/library.h); None if nothing does."""
    return "MKL, as loaded by torch" if ISAS[_isa()] == "amx" and _native().multiplies_by_library() else None


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    if call.op in _ROW_OPS:
        return None
    if call.dtype not in _DTYPES:
        return f"the kernels have no {str(call.dtype).removeprefix('torch.')}"
    if 0 in (call.in_features, call.out_features) or (
        not call.op.startswith("alignment") and call.hidden_features == 0
    ):
        return "a size is 0"
    return None


def _matrix(weight: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """A weight matrix that the kernels can read: contiguous, in fp32 or the compute dtype."""
    if weight is None:
        return None
    return (weight if weight.dtype in (compute, torch.float32) else weight.to(compute)).contiguous()


def _vector(vector: Tensor | None) -> Tensor | None:
    """A bias or gain that the kernels can read: contiguous, in fp32, bf16 or fp16."""
    if vector is None:
        return None
    return (vector if vector.dtype in _DTYPES else vector.to(torch.float32)).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """Rows that the kernels can read: contiguous along the last dimension, in fp32, bf16 or fp16."""
    if tensor.dtype not in _DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _readable(arguments: LinkArguments) -> LinkArguments:
    """The same call with tensors that the kernels can read, converted where they are not."""
    x, compute = _rows(arguments.x), arguments.dtype
    matrices = {name: _matrix(getattr(arguments, name), compute) for name in ("w1", "w2", "w3")}
    vectors = {name: _vector(getattr(arguments, name)) for name in _VECTORS}
    return arguments._replace(x=x, **matrices, **vectors)  # type: ignore[arg-type]


def _form(weight: Tensor | None, compute: torch.dtype, isa: int, tokens: int) -> Tensor | bool:
    """How the kernel reads a weight matrix: its packed panels; or, as it is stored, summed in panel order or not."""
    if weight is None or weight.numel() < _LEAST_PACKED or weight.dtype not in _DTYPES or not weight.is_contiguous():
        return False
    if tokens <= MOST_IN_PLACE and _reads_faster_in_place(compute, isa):
        return False
    panels = packing.lookup(weight, (compute, isa), _pack)
    return tokens > MOST_IN_PLACE if panels is None else panels


def _reads_faster_in_place(compute: torch.dtype, isa: int) -> bool:
    """Whether one or two rows leave packed weights aside: Intel's processors read four rows of a weight side by side
    faster than panels, which are one stream (docs/kernels.md, Streaming)."""
    return compute is torch.float32 and ISAS[isa] == "amx"


def _pack(weight: Tensor, layout: packing.Layout, memory: Callable[[int], Tensor] = pages.alone) -> Tensor:
    compute, isa = layout
    panels = memory(_native().packed_bytes(isa, _DTYPES[compute], *weight.shape))
    _native().pack_weight(isa, torch.get_num_threads(), _DTYPES[compute], weight, panels)
    return panels


def _forward(
    arguments: LinkArguments, in_place: bool, pre: Tensor | None, z: Tensor | None, stats: Tensor | None
) -> Tensor:
    """y; ``pre``, ``z`` and ``stats`` are filled for the backward pass, where they are given.

    ``in_place``: few rows read weights in place, summed in an order that packed copies do not have.
    """
    x, w1, w2 = arguments.x, arguments.w1, arguments.w2
    isa, tokens, out_features = _isa(), x.shape[0], w2.shape[0]
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    threads, run = torch.get_num_threads(), _native().link_forward
    forms: tuple[Tensor | bool, ...] = (False, False, False)
    most = MOST_STREAMED if in_place else MOST_IN_PLACE
    if tokens > most or (packing.in_scope() and not in_place):
        compute = arguments.dtype
        forms = tuple([_form(weight, compute, isa, tokens) for weight in (w1, w2, arguments.w3)])
    if run(isa, threads, arguments, *forms, y, pre, z, stats):
        return y
    readable = _readable(arguments)
    converted = torch.empty(tokens, out_features, dtype=readable.x.dtype, device=_CPU)
    if not run(isa, threads, readable, *forms, converted, pre, z, stats):
        raise AssertionError("converted tensors are readable")
    return converted.to(x.dtype)


def link_fwd(arguments: LinkArguments) -> Tensor:
    """y ``[T, out]`` in x's dtype; weights inside a `packed` scope are read from their packed copies."""
    return _forward(arguments, False, None, None, None)


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre [T, hidden], z [T, out] or [0], stats [4, T])``; pre and z in the compute dtype, stats fp32."""
    tokens, dtype = arguments.x.shape[0], arguments.dtype
    has_norm_in, has_norm_out = arguments.norm_in_weight is not None, arguments.norm_out_weight is not None
    pre = torch.empty(tokens, arguments.w1.shape[0], dtype=dtype, device=_CPU)
    z = torch.empty((tokens, arguments.w2.shape[0]) if has_norm_out else (0,), dtype=dtype, device=_CPU)
    # The kernel writes the rows of the norms that exist.
    allocate = torch.empty if has_norm_in and has_norm_out else torch.zeros
    stats = allocate(4, tokens, dtype=torch.float32, device=_CPU)
    y = _forward(arguments, True, pre, z if has_norm_out else None, stats)
    return y, pre, z, stats


def _gradient_of(tensor: Tensor) -> Tensor:
    """Where the kernels write a gradient: in fp32, bf16 or fp16, so that one of another dtype leaves through fp32."""
    if tensor.dtype in _DTYPES and tensor.is_contiguous():
        return torch.empty_like(tensor)  # half the time of naming everything, and a link has ten
    dtype = tensor.dtype if tensor.dtype in _DTYPES else torch.float32
    return torch.empty(tensor.shape, dtype=dtype, device=_CPU)


def link_bwd(
    arguments: LinkArguments, dy: Tensor, pre: Tensor, z: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of ``arguments.tensors``, in that order and in their dtypes; ``[0]`` where ``needs`` is False."""
    x, tensors = arguments.x, arguments.tensors
    outputs = [
        _gradient_of(tensor) if need and tensor is not None else None
        for need, tensor in zip(needs, tensors, strict=True)
    ]
    if x.shape[0] == 0:
        outputs = [None if grad is None else grad.zero_() for grad in outputs]
    else:
        isa, threads, run = _isa(), torch.get_num_threads(), _native().link_backward
        sums = None if arguments.norm_out_weight is None else z
        if not run(isa, threads, arguments, dy, pre, sums, stats, *outputs):
            rows = (_rows(dy), _rows(pre), None if sums is None else _rows(sums), stats.contiguous())
            if not run(isa, threads, _readable(arguments), *rows, *outputs):
                raise AssertionError("converted tensors are readable")
    return tuple(
        x.new_empty(0)
        if grad is None or tensor is None
        else grad
        if grad.dtype is tensor.dtype
        else grad.to(tensor.dtype)
        for grad, tensor in zip(outputs, tensors, strict=True)
    )


def pack_frozen(weight: Tensor) -> Tensor:
    """Panels of a contiguous weight ``[out, in]``, in its own dtype."""
    return _pack(weight, (weight.dtype, _isa()), pages.together)


def unpack_frozen(panels: Tensor, out_features: int, in_features: int, stored: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` that `pack_frozen` made panels of, bit by bit."""
    weight = torch.empty(out_features, in_features, dtype=stored, device=_CPU)
    _native().unpack_weight(_isa(), torch.get_num_threads(), panels, weight)
    return weight


def frozen_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, stored: torch.dtype) -> Tensor:
    """``x W^T + b`` for rows ``[..., in]`` in fp32 or the stored dtype, in x's dtype.

    ``panels`` may be the weight ``[out, in]`` itself, for up to `MOST_STREAMED` rows.
    """
    return _frozen(_native().frozen_forward, x, stored, (panels, bias), out_features)


def frozen_linear_bwd(dy: Tensor, panels: Tensor, in_features: int, stored: torch.dtype) -> Tensor:
    """``dy W`` for rows ``[..., out]``, in dy's dtype."""
    return _frozen(_native().frozen_backward, dy, stored, (panels,), in_features)


def _frozen(run: Any, rows: Tensor, stored: torch.dtype, weight: tuple[Tensor | None, ...], features: int) -> Tensor:
    result = torch.empty(*rows.shape[:-1], features, dtype=rows.dtype, device=_CPU)
    if result.numel() == 0:
        return result
    settings = (_isa(), torch.get_num_threads(), _DTYPES[stored])
    if not run(*settings, rows, *weight, result):
        panels, *bias = weight
        if not run(*settings, rows.contiguous(), panels, *map(_vector, bias), result):
            raise AssertionError("converted tensors are readable")
    return result


def reads(dtype: torch.dtype) -> bool:
    """Whether the kernels read tensors of a dtype."""
    return dtype in _DTYPES


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) (offset + weight)`` over the last dimension of ``x [..., n]``, in its dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=_CPU)
    if y.numel() == 0:
        return y
    run, settings = _native().rms_norm, (_isa(), torch.get_num_threads())
    if not run(*settings, x, weight, offset, eps, y) and not run(*settings, x.contiguous(), weight, offset, eps, y):
        raise AssertionError("contiguous rows are readable")
    return y


def stand_ins(tensors: tuple[Tensor, ...]) -> Any:
    """What `unchanged` takes, of tensors that hold one element for all."""
    return _native().read_stand_ins(tensors)


def unchanged(*watched: Any) -> bool:
    """Whether Python objects are what they were; see `recmas_kernels.watch`."""
    same: bool = _native().unchanged(*watched)
    return same


def versions(places: tuple[Any, ...]) -> bytes | None:
    """What says whether dictionaries were changed in between, by a comparison; None if this Python does not tell."""
    found: bytes | None = _native().versions(places)
    return found


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """``embeds[slot_rows[i]] = rows[i]`` in place: rows ``[n, d]``, embeds ``[R, d]``, slot_rows int64 unique."""
    rows = rows.to(embeds.dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _native().handoff_scatter(rows, slot_rows.contiguous(), embeds)


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
    _native().handoff_take(dembeds, slots, drows)
    return drows, dembeds


def alignment_bwd(grad: Tensor, dloss: Tensor) -> Tensor:
    """See `recmas_kernels.reference.alignment_bwd`; where a loss is the end, dloss is 1 and there is nothing to do."""
    return grad if dloss.item() == 1 else reference.alignment_bwd(grad, dloss)


def alignment_fwd(
    pred: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    """``(loss fp32 scalar, gradient [T, d] in pred's dtype)``; see the formula in ``reference.alignment_fwd``."""
    tokens, features = pred.shape
    loss = torch.zeros((), dtype=torch.float32, device=_CPU)
    grad = torch.empty(tokens, features, dtype=pred.dtype, device=_CPU)
    if grad.numel() == 0:
        return loss, grad
    rows, table = _rows(pred), _rows(target)
    ids = None if token_ids is None else token_ids.contiguous()
    weights = None if mask is None else mask.to(torch.float32).contiguous()
    settings = (_isa(), torch.get_num_threads())
    _native().alignment(*settings, rows, table, ids, weights, cosine_weight, mse_weight, embed_scale, loss, grad)
    return loss, grad
