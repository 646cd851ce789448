"""`FusedRecursiveLink`, the drop-in module that runs a link as fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels.functional import forget_packed, recursive_link
from recmas_kernels.layers import PlainLayers, why_not_plain
from recmas_kernels.link import RecursiveLink
from recmas_kernels.replaced import has_functions, is_for_torch


class FusedRecursiveLink(RecursiveLink):
    """A `RecursiveLink` that runs as fused kernels: same parameters, same state dict, same results within rounding.

    What works on the eager module works on this one with the same result, or raises one line that says why, or runs as
    plain torch. It runs as plain torch, through its children, while one of them is anything but a plain ``nn.Linear``
    or ``nn.LayerNorm`` without hooks (`explain` says which, and why), on nested and sparse rows, where torch's
    functions were replaced or may be (by a function mode or the class of a tensor), and with one layer (the ablation).
    Under autocast the arithmetic runs in autocast's dtype and the output keeps x's dtype.

    Attributes:
        recompute: True trains with less memory: only x is kept for the backward pass, which runs the forward kernel
            once more; see `recursive_link`. It may change at any time, and checkpoints do not store it.
    """

    recompute: bool = False
    _layers: PlainLayers | None = None  # remembered by `forward`; copies and pickles look for themselves

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype; see `recursive_link`."""
        config = self.config
        if config.layers == 1 or _is_for_layers(x):
            return super().forward(x)
        compiling = torch.compiler.is_compiling()
        layers = None if compiling else self._layers  # not read by a compiler, which would guard on it
        tensors = None if layers is None else layers.tensors(self._modules)
        if tensors is None:
            if why_not_plain(self._modules, config) is not None:
                return super().forward(x)
            layers = PlainLayers(self._modules, config)
            tensors = layers.read()
            if tensors is None:
                return super().forward(x)
            if not compiling:
                self._layers = layers
        assert tensors is not None, "plain layers have their parameters"
        w1, b1, w2, b2, w3, b3, norm_in, norm_out, eps = tensors
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
            eps=eps,
            activation=config.activation,
            recompute=self.recompute,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_layers"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedRecursiveLink:
        forget_packed(self.parameters())
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        forget_packed(self.parameters())
        super()._load_from_state_dict(*args, **kwargs)


def _is_for_layers(x: Any) -> bool:
    """Whether only torch's own functions take these rows: nested, sparse, of a class with functions, of a trace."""
    if type(x) is Tensor:
        return is_for_torch(x)
    return is_for_torch(x) or has_functions(x) if isinstance(x, Tensor) else isinstance(x, torch.fx.Proxy)
