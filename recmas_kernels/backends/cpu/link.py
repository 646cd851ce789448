"""A link: how its weights are read, what is allocated for it, and the calls of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels.backends import packing
from recmas_kernels.backends.cpu import readable
from recmas_kernels.backends.cpu.module import DEVICE, DTYPES, ISAS, isa_in_use, kernels
from recmas_kernels.backends.cpu.panels import MOST_STREAMED, pack
from recmas_kernels.reference import LinkArguments

_LEAST_PACKED = 4096  # elements: smaller weights fit into the first-level cache, packed or not
MOST_IN_PLACE = 2  # tokens: reading a weight where it lies was faster than laying it out, on every instruction set


def link_fwd(arguments: LinkArguments) -> Tensor:
    """y ``[T, out]`` in x's dtype; weights inside a `packed` scope are read from their packed copies."""
    return _forward(arguments, False, None, None, None)


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre [T, hidden], z [T, out] or [0], stats [4, T])``; pre and z in the compute dtype, stats fp32."""
    tokens, dtype = arguments.x.shape[0], arguments.dtype
    has_norm_in, has_norm_out = arguments.norm_in_weight is not None, arguments.norm_out_weight is not None
    pre = torch.empty(tokens, arguments.w1.shape[0], dtype=dtype, device=DEVICE)
    z = torch.empty((tokens, arguments.w2.shape[0]) if has_norm_out else (0,), dtype=dtype, device=DEVICE)
    # The kernel writes the rows of the norms that exist.
    allocate = torch.empty if has_norm_in and has_norm_out else torch.zeros
    stats = allocate(4, tokens, dtype=torch.float32, device=DEVICE)
    y = _forward(arguments, True, pre, z if has_norm_out else None, stats)
    return y, pre, z, stats


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
        isa, threads, run = isa_in_use(), torch.get_num_threads(), kernels().link_backward
        sums = None if arguments.norm_out_weight is None else z
        if not run(isa, threads, arguments, dy, pre, sums, stats, *outputs):
            sums = None if sums is None else readable.rows(sums)
            rows = (readable.rows(dy), readable.rows(pre), sums, stats.contiguous())
            if not run(isa, threads, readable.link(arguments), *rows, *outputs):
                raise AssertionError("converted tensors are readable")
    return tuple(
        x.new_empty(0)
        if grad is None or tensor is None
        else grad
        if grad.dtype is tensor.dtype
        else grad.to(tensor.dtype)
        for grad, tensor in zip(outputs, tensors, strict=True)
    )


def _forward(
    arguments: LinkArguments, in_place: bool, pre: Tensor | None, z: Tensor | None, stats: Tensor | None
) -> Tensor:
    """y; ``pre``, ``z`` and ``stats`` are filled for the backward pass, where they are given.

    ``in_place``: few rows read weights in place, summed in an order that packed copies do not have.
    """
    x, w1, w2 = arguments.x, arguments.w1, arguments.w2
    isa, tokens, out_features = isa_in_use(), x.shape[0], w2.shape[0]
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    threads, run = torch.get_num_threads(), kernels().link_forward
    forms: tuple[Tensor | bool, ...] = (False, False, False)
    most = MOST_STREAMED if in_place else MOST_IN_PLACE
    if tokens > most or (packing.in_scope() and not in_place):
        compute = arguments.dtype
        forms = tuple([_form(weight, compute, isa, tokens) for weight in (w1, w2, arguments.w3)])
    if run(isa, threads, arguments, *forms, y, pre, z, stats):
        return y
    arguments = readable.link(arguments)
    converted = torch.empty(tokens, out_features, dtype=arguments.x.dtype, device=DEVICE)
    if not run(isa, threads, arguments, *forms, converted, pre, z, stats):
        raise AssertionError("converted tensors are readable")
    return converted.to(x.dtype)


def _form(weight: Tensor | None, compute: torch.dtype, isa: int, tokens: int) -> Tensor | bool:
    """How the kernel reads a weight matrix: its packed panels; or, as it is stored, summed in panel order or not."""
    if weight is None or weight.numel() < _LEAST_PACKED or weight.dtype not in DTYPES or not weight.is_contiguous():
        return False
    if tokens <= MOST_IN_PLACE and _reads_faster_in_place(compute, isa):
        return False
    panels = packing.lookup(weight, (compute, isa), pack)
    return tokens > MOST_IN_PLACE if panels is None else panels


def _reads_faster_in_place(compute: torch.dtype, isa: int) -> bool:
    """Whether one or two rows leave packed weights aside: Intel's processors read four rows of a weight side by side
    faster than panels, which are one stream (docs/kernels.md, Streaming)."""
    return compute is torch.float32 and ISAS[isa] == "amx"


def _gradient_of(tensor: Tensor) -> Tensor:
    """Where the kernels write a gradient: in fp32, bf16 or fp16, so that one of another dtype leaves through fp32."""
    if tensor.dtype in DTYPES and tensor.is_contiguous():
        return torch.empty_like(tensor)  # half the time of naming everything, and a link has ten
    dtype = tensor.dtype if tensor.dtype in DTYPES else torch.float32
    return torch.empty(tensor.shape, dtype=dtype, device=DEVICE)
