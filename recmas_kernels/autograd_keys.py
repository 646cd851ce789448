"""What the ops are at the dispatcher's keys of autograd: recording, refusing, counting writes.

``torch.library.register_autograd`` records as well. A call through it is dispatched twice, whether it records or not,
and one that records looks up the schema's defaults: an op of sixteen arguments takes twice the time, or four times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from recmas_kernels.observed import function_without_transforms, in_forward_mode

_BELOW: Any = torch._C._after_autograd_keyset
# Plain tensors and no mode: nothing comes between autograd and the kernel, which need not be dispatched to.
_NOTHING_BETWEEN = frozenset(
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)


def records(
    op: str, run: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An Autograd kernel for an op that has a derivative.

    Args:
        op: its name.
        run: its kernel at every backend's key.
        setup: as `torch.library.register_autograd` takes it.
        backward: likewise.
    """
    overload = getattr(torch.ops.recmas, op).default

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        keys = keyset & _BELOW
        if keys.raw_repr() in _NOTHING_BETWEEN:
            return run(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys, *arguments)

    def forward(ctx: Any, *values: Any) -> Any:
        inputs = values[:-1]
        output = below(values[-1], inputs)
        setup(ctx, inputs, output)
        return output

    def backward_and_nothing(ctx: Any, *grads: Any) -> Any:
        found = backward(ctx, *grads)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_nothing)}
    function: Any = type(f"recmas_{op}", (torch.autograd.Function,), members)
    record = function_without_transforms(function)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if in_forward_mode() and _any_has_tangent(arguments):
            raise NotImplementedError(f"recmas::{op} has no derivative in forward mode: recmas_kernels' functions do")
        if not (torch.is_grad_enabled() and _any_requires_grad(arguments)):
            return below(keyset, arguments)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*arguments, keyset)  # which refuses
        return record(*arguments, keyset)

    return kernel


def refuses(op: str) -> Callable[..., Any]:
    """An Autograd kernel for an op that writes into its argument: RuntimeError instead of a silent zero."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            raise RuntimeError(f"recmas::{op} has no derivative: run it under torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.recmas, op).default.redispatch(keyset & _BELOW, *arguments)

    return kernel


def bumps_version(op: str, written: int) -> Callable[..., Any]:
    """An ADInplaceOrView kernel for an op that writes into its argument number ``written``: it shows in the version."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version(arguments[written])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload = getattr(torch.ops.recmas, op).default
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    for argument in arguments:  # noqa: SIM110 (a generator costs 1 us more)
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def _any_has_tangent(arguments: Sequence[Any]) -> bool:
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
