"""Proof that a decoder layer computes what the kernels compute of its parts: on random rows, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recmas_kernels.decoder_parts import Packed, Parts
from recmas_kernels.frozen_linear import OF_PACKING
from recmas_kernels.own_forward import OF_MODULES
from recmas_kernels.weights import named_weights

_ROWS, _BEFORE = 2, 6  # rows, and positions in the cache
_BOUND = 1e-4  # of the largest entry: two orders of float32 sums through one layer, and far below any other formula

Kernel = Callable[[Parts, Packed, Tensor, tuple[Tensor, Tensor], Tensor | None, Any], Tensor]


class Proofs:
    """Of the layers of one model; layers that differ in nothing but weights and index are proved once."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, bool]] = []

    def hold(self, layer: nn.Module, parts: Parts, packed: Packed, kernel: Kernel) -> bool:
        """Whether ``layer``'s class makes the same of random rows as ``kernel`` of its parts."""
        formula = _formula(layer, parts)
        for known, holds in self._held:
            if known == formula:
                return holds
        self._held.append((formula, _holds(layer, parts, packed, kernel)))
        return self._held[-1][1]


def _formula(layer: nn.Module, parts: Parts) -> Any:
    """All that decides what the layer computes, but for its weights and its index."""
    ignored = OF_MODULES | OF_PACKING | {"layer_idx"}
    described = []
    for name, part in layer.named_modules():
        # A tensor equals no other object, so layers that hold some are proved one by one.
        held = {key: object() if isinstance(value, Tensor) else value for key, value in part.__dict__.items()}
        shapes = {key: None if value is None else value.shape for key, value in part._parameters.items()}
        plain = {key: value for key, value in held.items() if key not in ignored}
        described.append((name, type(part), type(part).forward, plain, shapes))
    return described, [norm and norm.__dict__["forward"].computes for norm in parts.norms], parts.dtype


class _Cache:
    """Of one layer: what it held before, and what was appended."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class _AsItsClass(nn.Module):
    """A layer that is called as its class says, without a kernel in its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _holds(layer: nn.Module, parts: Parts, packed: Packed, kernel: Kernel) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return all(_agrees(layer, parts, packed, kernel, masked) for masked in (False, True))


def _agrees(layer: nn.Module, parts: Parts, packed: Packed, kernel: Kernel, masked: bool) -> bool:
    """On rows of their own, in float32: 16-bit rounding would hide small differences of the formula."""
    _, key_heads, features = parts.sizes
    shape = _ROWS, key_heads, _BEFORE, features
    before = torch.randn(2, *shape, device="cpu") * torch.tensor([4.0, 1.0]).view(2, 1, 1, 1, 1)  # wide scores
    x = torch.randn(_ROWS, 1, parts.features, device="cpu")
    turned = tuple(torch.randn(2, _ROWS, 1, features, device="cpu"))
    mask = torch.rand(_ROWS, 1, 1, _BEFORE + 1, device="cpu") < 0.5 if masked else None
    if mask is not None:
        mask[..., -1] = True
    caches = [_Cache(*before), _Cache(*before)]
    weights = {f"layer.{name}": weight.float() for name, weight in named_weights(layer)}
    given = {
        "attention_mask": mask,
        "position_embeddings": turned,
        "past_key_values": caches[0],
        "position_ids": torch.full((_ROWS, 1), _BEFORE, device="cpu"),
        "use_cache": True,
    }
    try:
        expected = functional_call(_AsItsClass(layer), weights, (x,), given)
    except Exception:  # a layer of another kind, which takes other arguments
        return False
    found = kernel(parts, packed, x, turned, mask, caches[1])
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    pairs = ((found, expected), (caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values))
    return all(bool((a - b).abs().max() <= _BOUND * b.abs().max()) for a, b in pairs)
