"""`SharedLinear`: a frozen `nn.Linear` whose weight another module holds, too, such as a head tied to the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recmas_kernels import frozen


class SharedLinear(nn.Linear):
    """An `nn.Linear` in all it holds; few rows are multiplied by a kernel that reads the weight where it lies.

    Nothing is packed, since a copy would double the weight. The library serves more than 16 rows, calls with gradients,
    and whatever observes or transforms the call.
    """

    _owners: int = 1  # who wants a SharedLinear here; see `share`

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if torch.compiler.is_compiling() or weight is None or not frozen.serves_in_place(x, weight, bias):
            return nn.Linear.forward(self, x)  # of a layer that is plain again, too
        return frozen.in_place_linear(x, weight, bias)


def share(linear: nn.Linear) -> SharedLinear:
    """Make an ``nn.Linear`` a `SharedLinear` in its place, until as many `unshare`."""
    if isinstance(linear, SharedLinear):
        linear._owners += 1
    else:
        linear.__class__ = SharedLinear
    assert isinstance(linear, SharedLinear)
    return linear


def unshare(linear: SharedLinear) -> None:
    """Undo one `share`: the last makes it an ``nn.Linear`` again."""
    if linear._owners > 1:
        linear._owners -= 1
        return
    linear.__dict__.pop("_owners", None)
    if type(linear) is SharedLinear:
        linear.__class__ = nn.Linear  # type: ignore[assignment]
