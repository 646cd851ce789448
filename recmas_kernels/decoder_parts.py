"""The parts of the decoder layers that the kernels know: attention with turned heads, and a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels.backends import cpu_decoder
from recmas_kernels.frozen_linear import FrozenLinear
from recmas_kernels.rms_norm import NormKernel
from recmas_kernels.watch import HOOKS

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_MORE_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}


@dataclass(frozen=True)
class Parts:
    """Of one layer.

    Attributes:
        linears: query, key, value, out, gate, up, down.
        norms: of the input, of queries, of keys, after attention, before and after the feed-forward part.
        sizes: heads, key heads, features of a head.
        scale: of the scores.
        index: of the layer in its cache.
        features: of rows.
        feed: features between gate and down, and the activation's number in `cpu_decoder.ACTIVATIONS`.
        dtype: of the weights.
    """

    linears: tuple[FrozenLinear, ...]
    norms: tuple[nn.Module | None, ...]
    sizes: tuple[int, int, int]
    scale: float
    index: int
    features: int
    feed: tuple[int, int]
    dtype: torch.dtype

    def fits(self, x: Tensor, turned: Any, mask: Any) -> bool:
        """Whether the kernels take these: rows ``[B, 1, d]``, cosines and sines, and the mask."""
        if x.dtype is not self.dtype or x.shape[2] != self.features or not _is_pair(turned):
            return False
        for angles in turned:
            if angles.shape not in ((1, 1, self.sizes[2]), (x.shape[0], 1, self.sizes[2])):
                return False
            if angles.dtype is not x.dtype or not angles.is_cpu:
                return False
        if mask is None:
            return True
        plain = type(mask) is Tensor and mask.dtype is torch.bool and mask.is_cpu and mask.dim() == 4
        return plain and mask.shape[0] in (1, x.shape[0]) and mask.shape[1] == mask.shape[2] == 1


class Packed(NamedTuple):
    """A layer's weights and norms as the two kernels take them; see `recmas_kernels.backends.cpu_decoder`."""

    inputs: tuple[Any, ...]
    output: tuple[Any, ...]

    @classmethod
    def of(cls, parts: Parts) -> Packed:
        """Those of a layer whose weights are packed."""
        held = [_weight(linear) for linear in parts.linears]
        query, key, value, out, gate, up, down = held
        norm, query_norm, key_norm, after, before, last = map(_arguments, parts.norms)
        return cls(norm + query + key + value + query_norm + key_norm, out + after + before + gate + up + down + last)


def parts_of(layer: nn.Module) -> Parts | None:
    """The parts of a layer that has these, whose linear layers are packed and whose norms run as kernels, and no more.

    That it computes with them what the kernels compute is for a proof to show.
    """
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None or layer._parameters or layer._buffers:
        return None
    if layer._modules.keys() - {"self_attn", "mlp"} not in (_NORMS, _NORMS | _MORE_NORMS):
        return None
    if attention._modules.keys() - set(_LINEARS["self_attn"]) not in (set(), _HEAD_NORMS):
        return None
    if mlp._modules.keys() != {*_LINEARS["mlp"], "act_fn"} or attention._parameters or mlp._parameters:
        return None
    linears = [
        part._modules.get(name)
        for part, names in ((attention, _LINEARS["self_attn"]), (mlp, _LINEARS["mlp"]))
        for name in names
    ]
    if any(_is_called(part) for part in layer.modules() if part is not layer):
        return None
    norms = _norms_of(layer, attention)
    if norms is None or not all(isinstance(linear, FrozenLinear) and linear.packed() for linear in linears):
        return None
    return _measured(attention, mlp, linears, norms)


def _is_called(part: nn.Module) -> bool:
    """Whether calling a part is more than its class's ``forward``: by hooks, or a ``forward`` of its own."""
    own = part.__dict__.get("forward")
    return any(part.__dict__[name] for name in HOOKS) or not (own is None or isinstance(own, NormKernel))


def _norms_of(layer: nn.Module, attention: nn.Module) -> tuple[nn.Module | None, ...] | None:
    """In the order of `Parts.norms`; None if one does not run as a kernel."""
    held = layer._modules
    between: tuple[nn.Module | None, ...] = (None, held.get("post_attention_layernorm"), None)
    if held.keys() >= _MORE_NORMS:
        between = tuple(held[name] for name in ("post_attention_layernorm", *sorted(_MORE_NORMS, reverse=True)))
    norms = (held.get("input_layernorm"), attention._modules.get("q_norm"), attention._modules.get("k_norm"), *between)
    served = all(norm is None or isinstance(norm.__dict__.get("forward"), NormKernel) for norm in norms)
    return norms if served and norms[0] is not None and norms[4] is not None else None


def _measured(
    attention: nn.Module, mlp: nn.Module, linears: list[Any], norms: tuple[nn.Module | None, ...]
) -> Parts | None:
    features, scale, index = (getattr(attention, name, None) for name in ("head_dim", "scaling", "layer_idx"))
    activation = _activation_of(mlp._modules["act_fn"])
    if type(features) is not int or type(scale) is not float or type(index) is not int or activation is None:
        return None
    query, key, value, out, gate, up, down = linears
    heads, key_heads = query.out_features // features, key.out_features // features
    hidden = gate.out_features
    expected = {
        query: (query.in_features, heads * features),
        key: (query.in_features, key_heads * features),
        value: (query.in_features, key_heads * features),
        out: (heads * features, query.in_features),
        gate: (query.in_features, hidden),
        up: (query.in_features, hidden),
        down: (hidden, query.in_features),
    }
    if any((linear.in_features, linear.out_features) != sizes for linear, sizes in expected.items()):
        return None
    if features % 2 or key_heads == 0 or heads % key_heads:
        return None
    weights = [linear._parameters["weight"] for linear in linears]
    widths = (query.in_features, features, features, *[query.in_features] * 3)
    for norm, width in zip(norms, widths, strict=True):
        if norm is not None:
            weights.append(norm._parameters["weight"])
            if weights[-1].shape != (width,):
                return None
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) != 1:
        return None
    sizes = heads, key_heads, features
    return Parts(tuple(linears), norms, sizes, scale, index, query.in_features, (hidden, activation), dtypes.pop())


def _activation_of(function: Any) -> int | None:
    """The number of the activation that this computes."""
    x = torch.linspace(-9, 9, 181, device="cpu")
    with torch.no_grad():
        try:
            found = function(x)
        except Exception:  # an activation of another kind
            return None
    for number, name in enumerate(cpu_decoder.ACTIVATIONS):
        if isinstance(found, Tensor) and torch.allclose(found, _ACTIVATIONS[name](x), rtol=1e-6, atol=1e-7):
            return number
    return None


def _weight(linear: FrozenLinear) -> tuple[Any, ...]:
    panels = linear.panels
    assert panels is not None
    return panels.data, cpu_decoder.dtype_number(panels.stored), linear._parameters["bias"]


def _arguments(norm: nn.Module | None) -> tuple[Any, ...]:
    if norm is None:
        return cpu_decoder.NO_NORM
    offset, eps = norm.__dict__["forward"].computes
    return norm._parameters["weight"], offset, eps


def _is_pair(turned: Any) -> bool:
    return isinstance(turned, tuple) and len(turned) == 2 and all(type(angles) is Tensor for angles in turned)
