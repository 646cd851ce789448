"""`FusedRecursiveLink`, the drop-in module that runs a link as fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from recmas_kernels.config import NORM_NAMES
from recmas_kernels.functional import Norm, forget_packed, recursive_link
from recmas_kernels.link import RecursiveLink


class FusedRecursiveLink(RecursiveLink):
    """A `RecursiveLink` that runs as fused kernels: same parameters, same state dict, same results within rounding.

    Only ``forward`` differs, so hooks on its inner ``nn.Linear``s do not run. Under autocast the arithmetic runs in
    autocast's dtype and the output keeps x's dtype. One-layer links (the ablation) run as plain torch.

    Attributes:
        recompute: True trains with less memory: only x is kept for the backward pass, which runs the forward kernel
            once more; see `recursive_link`. It may change at any time, and checkpoints do not store it.
    """

    recompute: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype; see `recursive_link`."""
        config = self.config
        if config.layers == 1:
            return super().forward(x)
        modules = self._modules  # nn.Module.__getattr__ costs about 0.3 us for each of up to eleven tensors
        w1, b1 = _weight_and_bias(modules["proj1"])
        w2, b2 = _weight_and_bias(modules["proj2"])
        w3, b3 = _weight_and_bias(modules["residual_proj"]) if config.residual == "linear" else (None, None)
        norm_in = norm_out = None
        if config.norm:
            name_in, name_out = NORM_NAMES[config.kind]
            norm_in, norm_out = _weight_and_bias(modules[name_in]), _weight_and_bias(modules[name_out])
        return recursive_link(
            x,
            w1,
            w2,
            b1,
            b2,
            w3=w3,
            b3=b3,
            residual=config.residual,
            norm_in=norm_in,
            norm_out=norm_out,
            eps=config.eps,
            activation=config.activation,
            recompute=self.recompute,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedRecursiveLink:
        forget_packed(self.parameters())
        return super()._apply(fn, recurse)


def _weight_and_bias(module: Any) -> Norm:
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]
