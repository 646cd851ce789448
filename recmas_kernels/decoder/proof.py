"""Proof that a decoder layer computes what the kernels compute of its parts: on random rows and weights.

Weights are random, since those of a model may be so small that another formula gives the same, and they may change.
The proof is in float32, where 16-bit rounding hides nothing; a layer of 16 bits agrees in its own type, too, roughly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recmas_kernels import frozen
from recmas_kernels.decoder.parts import Packed, Parts, packed_of
from recmas_kernels.frozen_linear import OF_PACKING
from recmas_kernels.watch import INNER

_POSITIONS = (70, 1_000_003)
"""Of the two rows; one is beyond what any model was trained for, where some scale their queries."""
_BEFORE = 70  # positions in the cache
_BOUND = 1e-4  # of the largest entry: two orders of float32 sums through one layer, and far below any other formula
_ROUGH = 0.1  # in 16 bits

Kernel = Callable[[Parts, Packed, Tensor, tuple[Tensor, Tensor], Tensor | None, Any], Tensor]


class Proofs:
    """Of the layers of one model. Layers that differ in nothing but weights and index share most of theirs."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, bool, _Weights]] = []

    def hold(self, layer: nn.Module, parts: Parts, kernel: Kernel) -> bool:
        """Whether ``layer``'s class makes the same of random rows as ``kernel`` of its parts."""
        formula = _formula(layer, parts)
        for known, holds, weights in self._held:
            if _same(known, formula):
                return holds and _agrees(layer, parts, kernel, weights, masked=True)
        generator = torch.Generator("cpu").manual_seed(0)
        weights = _Weights(parts, generator)
        holds = all(_agrees(layer, parts, kernel, weights, masked) for masked in (False, True))
        if holds and parts.dtype is not torch.float32:
            holds = _agrees(layer, parts, kernel, _Weights(parts, generator, parts.dtype), masked=True)
        self._held.append((formula, holds, weights))
        return holds


def _formula(layer: nn.Module, parts: Parts) -> Any:
    """What decides what the layer computes, as far as it can be seen, but for its weights and its index."""
    ignored = INNER | OF_PACKING | {"forward", "layer_idx"}
    described = []
    for name, part in layer.named_modules():
        shapes = {key: None if value is None else value.shape for key, value in part._parameters.items()}
        plain = {key: value for key, value in part.__dict__.items() if key not in ignored}
        described.append((name, type(part), type(part).forward, plain, shapes))
    return described, parts.norm_rules, parts.dtype


def _same(known: Any, formula: Any) -> bool:
    try:
        return bool(known == formula)
    except Exception:  # attributes whose comparison is no bool, such as tensors and arrays
        return False


class _Weights:
    """Random ones for a layer: as tensors by their names in `Parts.tensors`, and as the kernels take them."""

    def __init__(self, parts: Parts, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in parts.tensors().items():
            random = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5
            fan_in = tensor.shape[-1] if tensor.dim() == 2 else 1
            self.tensors[name] = (random * (12 / fan_in) ** 0.5).to(dtype)
        panels = {name: frozen.pack(self.tensors[f"{name}.weight"]) for name in parts.linears}
        self.packed = packed_of(parts, self.tensors, panels)
        self.generator, self.dtype = generator, dtype


class _Cache:
    """Of one layer: what it held before, and what was appended, with all that it was told."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.told: Any = None

    def update(self, keys: Tensor, values: Tensor, *told: Any, **more: Any) -> tuple[Tensor, Tensor]:
        self.told = told, more
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        return self.keys, self.values


def _shadow(part: nn.Module, tensors: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """A module like this with other weights; the module itself, which other threads may call, is not touched."""
    made: nn.Module = object.__new__(type(part))
    made.__dict__.update({name: value for name, value in part.__dict__.items() if name != "forward"})
    parameters = {
        name: value if value is None else nn.Parameter(tensors[prefix + name], requires_grad=False)
        for name, value in part._parameters.items()
    }
    children = {
        name: value if value is None else _shadow(value, tensors, f"{prefix}{name}.")
        for name, value in part._modules.items()
    }
    made.__dict__.update(_parameters=parameters, _modules=children, _buffers=dict(part._buffers))
    return made


@torch.no_grad()
def _agrees(
    layer: nn.Module,
    parts: Parts,
    kernel: Kernel,
    weights: _Weights,
    masked: bool,
) -> bool:
    dtype = weights.dtype

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(sizes, generator=weights.generator, dtype=torch.float32, device="cpu")
        return (made * scale).to(dtype)

    _, key_heads, features = parts.sizes
    rows = len(_POSITIONS)
    keys = random(rows, key_heads, _BEFORE, features, scale=4.0)  # wide scores
    values = random(rows, key_heads, _BEFORE, features)
    x, turned = random(rows, 1, parts.features), (random(rows, 1, features), random(rows, 1, features))
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, _BEFORE + 1, generator=weights.generator, device="cpu") < 0.5
        mask[..., -1] = True
    caches = [_Cache(keys, values), _Cache(keys, values)]
    given = {
        "attention_mask": mask,
        "position_embeddings": turned,
        "past_key_values": caches[0],
        "position_ids": torch.tensor(_POSITIONS, device="cpu")[:, None],
        "use_cache": True,
    }
    try:
        expected = type(layer).forward(_shadow(layer, weights.tensors), x, **given)
        found = kernel(parts, weights.packed, x, turned, mask, caches[1])
    except Exception:  # a layer of another kind, which takes other arguments or makes other shapes
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape or caches[0].told != caches[1].told:
        return False
    bound = _BOUND if dtype is torch.float32 else _ROUGH
    pairs = ((found, expected), (caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values))
    return all(a.shape == b.shape and bool((a - b).abs().max() <= bound * b.abs().max()) for a, b in pairs)
