"""Matrix products of 16-bit operands by way of float32, where the library's own take minutes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_NARROW = (torch.bfloat16, torch.float16)


class WideProducts(TorchDispatchMode):
    """Within, products of 16-bit matrices sum in float32 and round once, forward and backward.

    So does a library with such products, up to the order of the sums; one without may round more often. The gate takes
    its budget from a result within, where eager is over its time bound.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and args[0].dtype in _NARROW:
            wide = [value.float() if isinstance(value, Tensor) else value for value in args]
            return func(*wide, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))
