"""Whether anything observes ops, so that each must go through torch's dispatcher, or needs rules that no op has.

A call through the dispatcher costs about 4 us for an op of sixteen arguments. Unless something observes ops,
`functional` calls the kernels without it. Observers are compilation and export, dispatch modes (fake tensors,
``make_fx``, FLOP counters), function modes, ``torch.func`` transforms, forward-mode AD, ``torch.jit.trace`` and
profilers. Gradients whose values are not those in memory (negated views, zeros without memory, the batches of
``is_grads_batched``) need the dispatcher as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

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
        """True: this torch does not show whether anything observes ops, so every op goes through the dispatcher."""
        return True

    def traced() -> bool:
        """Whether a compilation is active: this torch does not show the rest."""
        return torch.compiler.is_compiling()

    def transformed() -> bool:
        """False: this torch does not show whether a transform is active; the ops raise torch's own errors then."""
        return False

    def in_forward_mode() -> bool:
        """False: this torch does not show it; derivatives in forward mode are dropped by the ops then."""
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

    def in_forward_mode() -> bool:
        """Whether there may be tensors with tangents."""
        return forward_ad._current_level >= 0

    @cache
    def _ordinary_keys(device: torch.device) -> int:
        with torch.inference_mode(False):
            return _dispatch_keys(torch.zeros(0, device=device)).raw_repr()

    def is_ordinary(tensor: Tensor) -> bool:
        """Whether a tensor is no subclass and its memory holds its values: not negated, no implied zeros, no batch."""
        return type(tensor) is Tensor and not _dispatch_keys(tensor).raw_repr() & ~_ordinary_keys(tensor.device)


def function_without_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, for calls that no ``torch.func`` transform observes, on tensors that none has left behind.

    ``apply`` itself looks at every argument in Python, for 4 us if there are sixteen.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
