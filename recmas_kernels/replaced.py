"""Whether somebody stands in the place of torch's functions, which a kernel would pass over.

Modes and classes of tensors do so with a ``__torch_function__`` of their own; others assign to ``F.linear`` and its
like. Some tensors only torch's functions take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torch._C import _len_torch_function_stack
    from torch.overrides import _get_current_function_mode_stack
except ImportError:  # a torch that has moved one of them

    def _in_function_mode() -> bool:
        """False: this torch does not show it."""
        return False

else:

    def _in_function_mode() -> bool:
        """Whether a function mode other than torch's own is active on this thread."""
        if _len_torch_function_stack() == 0:
            return False
        rooms = {type(mode).__module__.partition(".")[0] for mode in _get_current_function_mode_stack()}
        return rooms != {"torch"}


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
