"""`FusedRecursiveLink`, the drop-in module that runs a link as fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels.functional import forget_packed, recursive_link
from recmas_kernels.layers import PlainLayers, why_not_plain
from recmas_kernels.link import RecursiveLink


class FusedRecursiveLink(RecursiveLink):
    """A `RecursiveLink` that runs as fused kernels: same parameters, same state dict, same results within rounding.

    What works on the eager module works on this one with the same result, or raises one line that says why, or runs as
    plain torch. It runs as plain torch, through its children, while one of them is anything but a plain ``nn.Linear``
    or ``nn.LayerNorm`` without hooks (`explain` says which, and why), on nested tensors, and with one layer (the
    ablation). Under autocast the arithmetic runs in autocast's dtype and the output keeps x's dtype.

    Attributes:
        recompute: True trains with less memory: only x is kept for the backward pass, which runs the forward kernel
            once more; see `recursive_link`. It may change at any time, and checkpoints do not store it.
    """

    recompute: bool = False
    _layers: PlainLayers | None = None  # remembered by `forward`; copies and pickles look for themselves

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype; see `recursive_link`."""
        config = self.config
        if config.layers == 1 or (x.is_nested if isinstance(x, Tensor) else isinstance(x, torch.fx.Proxy)):
            return super().forward(x)
        layers = self._layers
        if layers is None or torch.compiler.is_compiling() or not layers.unchanged(self._modules):
            layers = self._look()
            if layers is None:
                return super().forward(x)
        proj1, proj2, residual_proj = layers.proj1, layers.proj2, layers.residual_proj
        norm_in, norm_out = layers.norm_in, layers.norm_out
        return recursive_link(
            x,
            proj1["weight"],
            proj2["weight"],
            proj1["bias"],
            proj2["bias"],
            w3=None if residual_proj is None else residual_proj["weight"],
            b3=None if residual_proj is None else residual_proj["bias"],
            residual=config.residual,
            norm_in=None if norm_in is None else (norm_in["weight"], norm_in["bias"]),
            norm_out=None if norm_out is None else (norm_out["weight"], norm_out["bias"]),
            eps=layers.eps,
            activation=config.activation,
            recompute=self.recompute,
        )

    def _look(self) -> PlainLayers | None:
        """The plain layers as they are now; None if the children must be called."""
        if why_not_plain(self._modules, self.config) is not None:
            return None
        layers = PlainLayers(self._modules, self.config)
        if not torch.compiler.is_compiling():
            self._layers = layers
        return layers

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_layers"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedRecursiveLink:
        forget_packed(self.parameters())
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        forget_packed(self.parameters())
        super()._load_from_state_dict(*args, **kwargs)
