"""Whether something has to see every op go through torch's dispatcher, or wants rules that no kernel has.

A trip through the dispatcher costs about 4 us for an op of sixteen arguments. When nobody looks, `functional` calls the
kernels without it. Looked for: compilation and export, dispatch modes (fake tensors, ``make_fx``, FLOP counters),
function modes, ``torch.func`` transforms, forward-mode AD, ``torch.jit.trace`` and profilers; and gradients that are
not the memory they seem to be (negated views, zeros without memory, the batches of ``is_grads_batched``).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import _dispatch_keys, _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import TransformType, peek_interpreter_stack

    forward_ad._current_level  # noqa: B018 (it must be there; -1 while there are no dual numbers)
except (AttributeError, ImportError):  # a torch that has moved one of them

    def observed() -> bool:
        """True: this torch does not say whether anything observes ops, so every op goes through the dispatcher."""
        return True

    def transformed() -> bool:
        """False: this torch does not say whether a transform is under way; the ops raise torch's own errors then."""
        return False

    def is_ordinary(tensor: Tensor) -> bool:
        """False: this torch does not say."""
        return False

else:
    _DIFFERENTIATING = (TransformType.Grad, TransformType.Jvp, TransformType.Vmap)

    def observed() -> bool:
        """Whether a trace, mode, transform or profiler is active on this thread; 0.3 us."""
        return (
            torch.compiler.is_compiling()
            or _len_torch_dispatch_stack() > 0
            or _len_torch_function_stack() > 0
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _profiler_enabled()
            or _get_tracing_state() is not None
        )

    def transformed() -> bool:
        """Whether ``torch.func`` differentiates or batches, or forward-mode AD runs: rules that the ops do not have."""
        if torch.compiler.is_compiling():
            return False
        interpreter = peek_interpreter_stack()
        return forward_ad._current_level >= 0 or (interpreter is not None and interpreter.key() in _DIFFERENTIATING)

    @cache
    def _ordinary_keys(device_type: str) -> int:
        with torch.inference_mode(False):
            return _dispatch_keys(torch.zeros(0, device=device_type)).raw_repr()

    def is_ordinary(tensor: Tensor) -> bool:
        """Whether a tensor, no subclass, holds its numbers as they are: not negated, no implied zeros, no batch."""
        return type(tensor) is Tensor and not _dispatch_keys(tensor).raw_repr() & ~_ordinary_keys(tensor.device.type)
