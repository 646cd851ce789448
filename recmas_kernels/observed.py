"""Whether anything observes ops, so that each must go through torch's dispatcher, or needs rules that no op has.

A call through the dispatcher costs about 4 us for an op of sixteen arguments. Unless something observes ops,
`functional` calls the kernels without it. Observers are compilation and export, dispatch modes (fake tensors,
``make_fx``, FLOP counters), function modes, ``torch.func`` transforms, forward-mode AD, ``torch.jit.trace`` and
profilers. Gradients whose values are not those in memory (negated views, zeros without memory, the batches of
``is_grads_batched``) need the dispatcher as well.

Besides: whether somebody stands in the place of torch's functions, which a kernel would pass over, and which tensors
only these functions take.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    from torch._C import _dispatch_keys, _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import TransformType, peek_interpreter_stack
    from torch.overrides import _get_current_function_mode_stack

    forward_ad._current_level  # noqa: B018 (it must be there; -1 while there are no dual numbers)
except (AttributeError, ImportError):  # a torch that has moved one of them

    def observed() -> bool:
        """True: this torch does not show whether anything observes ops, so every op goes through the dispatcher."""
        return True

    def traced() -> bool:
        """Whether a compilation is active: this torch does not show the rest."""
        return torch.compiler.is_compiling()

    def transformed() -> bool:
        """False: this torch does not show whether a transform is active; the ops raise torch's own errors then."""
        return False

    def _in_function_mode() -> bool:
        """False: this torch does not show it."""
        return False

    def is_ordinary(tensor: Tensor) -> bool:
        """False: this torch does not show it."""
        return False

else:
    _DIFFERENTIATING = (TransformType.Grad, TransformType.Jvp, TransformType.Vmap)

    def observed() -> bool:
        """Whether a trace, mode, transform or profiler is active on this thread; 0.3 us."""
        return traced() or _len_torch_function_stack() > 0 or _profiler_enabled()

    def traced() -> bool:
        """`observed`, but for function modes (a device context) and profilers, which leave tensors as they are."""
        return (
            torch.compiler.is_compiling()
            or _len_torch_dispatch_stack() > 0
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _get_tracing_state() is not None
        )

    def transformed() -> bool:
        """Whether ``torch.func`` differentiates or batches, or forward-mode AD runs; ops have no rules for these."""
        if torch.compiler.is_compiling():
            return False
        interpreter = peek_interpreter_stack()
        return forward_ad._current_level >= 0 or (interpreter is not None and interpreter.key() in _DIFFERENTIATING)

    @cache
    def _ordinary_keys(device_type: str) -> int:
        with torch.inference_mode(False):
            return _dispatch_keys(torch.zeros(0, device=device_type)).raw_repr()

    def _in_function_mode() -> bool:
        """Whether a function mode other than torch's own is active on this thread."""
        if _len_torch_function_stack() == 0:
            return False
        rooms = {type(mode).__module__.partition(".")[0] for mode in _get_current_function_mode_stack()}
        return rooms != {"torch"}

    def is_ordinary(tensor: Tensor) -> bool:
        """Whether a tensor is no subclass and its memory holds its values: not negated, no implied zeros, no batch."""
        return type(tensor) is Tensor and not _dispatch_keys(tensor).raw_repr() & ~_ordinary_keys(tensor.device.type)


_LINEAR, _GELU, _LAYER_NORM = torch._C._nn.linear, torch._C._nn.gelu, F.layer_norm
_ATTENTION, _SILU = torch._C._nn.scaled_dot_product_attention, F.silu
_LINEAR_FORWARD, _NORM_FORWARD = nn.Linear.forward, nn.LayerNorm.forward


def functions_replaced() -> bool:
    """Whether others stand in the place of functions that plain layers call, or a mode may put them there; 0.2 us."""
    if torch.compiler.is_compiling():  # it traces what stands there
        return False
    return (
        F.linear is not _LINEAR
        or F.gelu is not _GELU
        or F.layer_norm is not _LAYER_NORM
        or F.scaled_dot_product_attention is not _ATTENTION
        or F.silu is not _SILU
        or nn.Linear.forward is not _LINEAR_FORWARD
        or nn.LayerNorm.forward is not _NORM_FORWARD
        or _in_function_mode()
    )


_SILENT = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]


def has_functions(tensor: Tensor | None) -> bool:
    """Whether a tensor's class may put others in the place of torch's functions; one that only dispatches does not."""
    if tensor is None or type(tensor) in (Tensor, nn.Parameter):
        return False
    function = type(tensor).__torch_function__
    return getattr(function, "__func__", function) not in _SILENT


def is_for_torch(tensor: Tensor) -> bool:
    """Whether a tensor has no memory that holds its elements in rows: nested, sparse and the like."""
    return tensor.is_nested or tensor.layout is not torch.strided
