"""The compiled CUDA kernels: which calls they take, allocation, and the native calls on torch's current stream.

The only caller of ``_cuda``, which has the link's forward over few tokens. A handoff is torch's own copies of rows: a
kernel would move the same bytes in as many launches. Other calls are declined, and the next backend in the table serves
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from recmas_kernels.backends import native
from recmas_kernels.backends.call import Call
from recmas_kernels.reference import LinkArguments, handoff_, handoff_bwd, handoff_fwd

__all__ = ["handoff_", "handoff_bwd", "handoff_fwd", "link_fwd", "link_fwd_train"]

_HANDOFF = ("handoff_fwd", "handoff_", "handoff_bwd")
_LINK = ("link_fwd", "link_fwd_train")
PIECE = 16  # csrc/cuda/link_plan.h, kPiece
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
    driver, toolkit = module.driver_version(), module.toolkit_version
    # A runtime works on older drivers of the same major version, never on an older major one.
    if driver // 1000 < toolkit // 1000:
        return f"the driver serves CUDA {_version(driver)}, the module was built with CUDA {_version(toolkit)}"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        reason = code_missing(capability, module.architectures.split(","), driver, toolkit)
        if reason is not None:
            return f"cuda:{device} has compute capability {capability[0]}.{capability[1]}: {reason}"
    return None


def code_missing(capability: tuple[int, int], architectures: Sequence[str], driver: int, toolkit: int) -> str | None:
    """Why a module has nothing that a device can run; None if it has.

    Args:
        capability: of the device.
        architectures: as CMake writes them: ``80-real`` is machine code, ``90-virtual`` PTX, ``90`` both; an ``a``
            stands for code that no other device runs.
        driver: newest CUDA that the driver serves, 1000 major + 10 minor.
        toolkit: the CUDA that the module was built with.
    """
    translated = False
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        built = divmod(int(number.rstrip("af")), 10)
        alike = built == capability or (built[0] == capability[0] and built <= capability and number.isdigit())
        if alike and kind != "virtual":
            return None
        translated = translated or (built <= capability and number.isdigit() and kind != "real")
    if not translated:
        return f"the module holds code for {', '.join(architectures)} alone"
    if driver < toolkit:  # machine code runs on an older driver of the same major version, but PTX is not read by it
        return (
            f"its code would have to be translated, and the driver, for CUDA {_version(driver)}, reads no PTX of CUDA "
            f"{_version(toolkit)}"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    if call.op in _HANDOFF:
        return None
    if call.op not in _LINK:
        return f"the CUDA module has no {call.op}, only the link's forward"
    if call.dtype not in _DTYPES:
        return f"the kernels have no {str(call.dtype).removeprefix('torch.')}"
    if call.tokens > MOST_TOKENS:
        return f"{call.tokens} tokens: its link kernels stream the weights past {MOST_TOKENS} at most"
    if 0 in (call.in_features, call.hidden_features, call.out_features):
        return "a size is 0"
    for name, features in (("in", call.in_features), ("hidden", call.hidden_features)):
        if features * call.dtype.itemsize % PIECE:
            return f"rows of {features} {name} features are no multiple of {PIECE} bytes, in which weights are streamed"
    return None


def describe(call: Call) -> str:
    """What decides a served call's speed, for `explain`: dtype, device and driver."""
    if call.op in _HANDOFF:
        return "by torch's own copies of rows"
    major, minor = torch.cuda.get_device_capability()
    driver = _version(_native().driver_version())
    return f"{str(call.dtype).removeprefix('torch.')} on sm_{major}{minor}, driver for CUDA {driver}"


def _rows(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """Rows that the kernels can read: fp32 or of the compute dtype, contiguous along the last dimension."""
    if tensor.dtype != compute:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _matrix(weight: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """A weight matrix in the compute dtype; a master of another dtype is cast by torch, in a pass of its own."""
    if weight is None:
        return None
    weight = weight.to(compute).contiguous()
    return weight.clone() if weight.data_ptr() % PIECE else weight  # a part of something larger, as shards are


def _vector(vector: Tensor | None) -> Tensor | None:
    if vector is not None and vector.dtype not in _DTYPES:
        vector = vector.to(torch.float32)
    return vector if vector is None else vector.contiguous()


def _norm(gain: Tensor | None, bias: Tensor | None, written: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Both parameters of a norm in one dtype: that of what it writes, or fp32."""
    alike = gain is None or (gain.dtype == written and (bias is None or bias.dtype == written))
    dtype = written if alike else torch.float32
    gain, bias = (None if vector is None else vector.to(dtype).contiguous() for vector in (gain, bias))
    return gain, bias


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)
def _workspace_bytes(sizes: tuple[int, int, int, int], compute: int, norm_in: bool, norm_out: bool) -> int:
    return _native().link_forward_workspace(sizes, compute, norm_in, norm_out)


def _forward(arguments: LinkArguments, pre: Tensor | None, z: Tensor | None, stats: Tensor | None) -> Tensor:
    """y; ``pre``, ``z`` and ``stats`` are filled for the backward pass, where they are given."""
    x, w1, b1, w2, b2, w3, b3, gain_in, bias_in, gain_out, bias_out, residual, gelu, eps, dtype = arguments
    rows = _rows(x, dtype)
    sizes = (x.shape[0], x.shape[1], w1.shape[0], w2.shape[0])
    y = torch.empty(sizes[0], sizes[3], dtype=rows.dtype, device=x.device)
    if sizes[0] == 0:
        return y.to(x.dtype)
    matrices = [_matrix(weight, dtype) for weight in (w1, w2, w3)]
    norms = *_norm(gain_in, bias_in, dtype), *_norm(gain_out, bias_out, rows.dtype)
    vectors = [*map(_vector, (b1, b2, b3)), *norms]
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
