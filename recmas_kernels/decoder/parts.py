"""The parts of the decoder layers that the kernels know: attention with turned heads, and a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels.backends.cpu import decoder
from recmas_kernels.frozen import Panels
from recmas_kernels.frozen_linear import FrozenLinear
from recmas_kernels.rms_norm import NormKernel
from recmas_kernels.watch import HOOKS

PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_MORE_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}
KNOWN = {
    f"transformers.models.{room}.modeling_{room}.{name}DecoderLayer"
    for room, name in {
        "gemma": "Gemma",
        "gemma3": "Gemma3",
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
    }.items()
}
"""Classes of layers whose code was read: a proof on random rows cannot see a rule for other rows or positions."""


@dataclass(frozen=True)
class Parts:
    """Of one layer.

    Attributes:
        linears: query, key, value, out, gate, up, down, by their names in the layer.
        norms: of the input, of queries, of keys, after attention, before and after the feed-forward part; by name.
        norm_rules: ``(offset, eps)`` of each norm.
        sizes: heads, key heads, features of a head.
        scale: of the scores.
        index: of the layer in its cache.
        features: of rows.
        feed: features between gate and down, and the activation's number in `decoder.ACTIVATIONS`.
        dtype: of the weights.
    """

    linears: dict[str, FrozenLinear]
    norms: tuple[tuple[str, nn.Module] | None, ...]
    norm_rules: tuple[tuple[float, float] | None, ...]
    sizes: tuple[int, int, int]
    scale: float
    index: int
    features: int
    feed: tuple[int, int]
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Weights, biases and gains by their names in the layer; packed weights as what stands for them."""
        parts = [*self.linears.items(), *filter(None, self.norms)]
        held = ((f"{name}.{key}", tensor) for name, part in parts for key, tensor in part._parameters.items())
        return {name: tensor for name, tensor in held if tensor is not None}

    def fits(self, x: Tensor, turned: Any, mask: Any) -> bool:
        """Whether the kernels take these: rows ``[B, 1, d]``, cosines and sines, and the mask."""
        if x.dtype is not self.dtype or x.shape[2] != self.features or not _is_pair(turned):
            return False
        for angles in turned:
            if angles.shape not in ((1, 1, self.sizes[2]), (x.shape[0], 1, self.sizes[2])):
                return False
            if angles.dtype is not x.dtype or not is_plain(angles):
                return False
        if mask is None:
            return True
        return is_plain(mask) and mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1

    def reads(self, x: Tensor, keys: Any, values: Any, mask: Tensor | None) -> bool:
        """Whether the kernels take what the cache holds, ``[B, key heads, T, D]``, and a mask for it."""
        if not (is_plain(keys) and is_plain(values)) or not keys.dtype is values.dtype is x.dtype or keys.dim() != 4:
            return False
        rows, (_, key_heads, features) = x.shape[0], self.sizes
        if keys.shape != values.shape or keys.shape[:2] != (rows, key_heads) or keys.shape[3] != features:
            return False
        return mask is None or mask.shape in ((1, 1, 1, keys.shape[2]), (rows, 1, 1, keys.shape[2]))


def is_plain(tensor: Any) -> bool:
    """Whether something is a tensor of the CPU whose memory holds its values."""
    return type(tensor) is Tensor and tensor.is_cpu and not (tensor.is_neg() or tensor._is_zerotensor())


class Packed(NamedTuple):
    """A layer's weights and norms as the two kernels take them; see `recmas_kernels.backends.cpu.decoder`."""

    inputs: tuple[Any, ...]
    output: tuple[Any, ...]
    vectors: tuple[Tensor, ...]  # the biases and gains among them

    def readable(self, dtype: torch.dtype) -> bool:
        """Whether biases and gains are of this dtype, and the kernels read them as they lie in memory."""
        return all(vector.dtype is dtype and vector.is_contiguous() and not vector.is_neg() for vector in self.vectors)


def packed_of(parts: Parts, tensors: dict[str, Tensor], panels: dict[str, Panels]) -> Packed:
    """Of a layer with these biases and gains (names of `Parts.tensors`) and packed weights (of `Parts.linears`)."""
    biases = {name: tensors.get(f"{name}.bias") for name in parts.linears}
    gains = [None if named is None else tensors[f"{named[0]}.weight"] for named in parts.norms]
    query, key, value, out, gate, up, down = (
        (panels[name].data, decoder.dtype_number(panels[name].stored), bias) for name, bias in biases.items()
    )
    norm, query_norm, key_norm, after, before, last = (
        decoder.NO_NORM if rule is None else (gain, *rule) for gain, rule in zip(gains, parts.norm_rules, strict=True)
    )
    return Packed(
        norm + query + key + value + query_norm + key_norm,
        out + after + before + gate + up + down + last,
        tuple(vector for vector in (*biases.values(), *gains) if vector is not None),
    )


def is_known(layer: nn.Module) -> bool:
    """Whether a module is of a `KNOWN` class."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}" in KNOWN


def parts_of(layer: nn.Module) -> Parts | None:
    """The parts of a layer of a known class that has these, packed linear layers and norms that run as kernels, only.

    That it computes with them what the kernels compute is for a proof to show.
    """
    if not is_known(layer):
        return None
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None or layer._parameters or layer._buffers:
        return None
    if layer._modules.keys() - {"self_attn", "mlp"} not in (_NORMS, _NORMS | _MORE_NORMS):
        return None
    if attention._modules.keys() - set(_LINEARS["self_attn"]) not in (set(), _HEAD_NORMS):
        return None
    if mlp._modules.keys() != {*_LINEARS["mlp"], "act_fn"} or attention._parameters or mlp._parameters:
        return None
    parts = {"self_attn": attention, "mlp": mlp}
    linears = {f"{name}.{key}": parts[name]._modules.get(key) for name, keys in _LINEARS.items() for key in keys}
    if layer.training or any(_is_called(part) or part.training for part in layer.modules() if part is not layer):
        return None
    if not all(isinstance(linear, FrozenLinear) and linear.packed() for linear in linears.values()):
        return None
    return _measured(attention, mlp, linears, _norms_of(layer, attention))


def _is_called(part: nn.Module) -> bool:
    """Whether calling a part is more than its class's ``forward``: by hooks, or a ``forward`` of its own."""
    own = part.__dict__.get("forward")
    return any(part.__dict__[name] for name in HOOKS) or not (own is None or isinstance(own, NormKernel))


def _norms_of(layer: nn.Module, attention: nn.Module) -> tuple[tuple[str, nn.Module] | None, ...]:
    """In the order of `Parts.norms`."""
    last = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    if not layer._modules.keys() >= _MORE_NORMS:
        last = ("", "post_attention_layernorm", "")
    heads = ("self_attn.q_norm", "self_attn.k_norm") if attention._modules.keys() >= _HEAD_NORMS else ("", "")
    names = ("input_layernorm", *heads, *last)
    return tuple((name, layer.get_submodule(name)) if name else None for name in names)


def _rule_of(norm: nn.Module) -> tuple[float, float] | None:
    """``(offset, eps)`` of a norm that runs as a kernel, as it is now."""
    kernel = norm.__dict__.get("forward")
    return kernel.computes if isinstance(kernel, NormKernel) and kernel.look() else None


def _measured(
    attention: nn.Module, mlp: nn.Module, linears: dict[str, Any], norms: tuple[tuple[str, nn.Module] | None, ...]
) -> Parts | None:
    features, scale, index = (getattr(attention, name, None) for name in ("head_dim", "scaling", "layer_idx"))
    activation = _activation_of(mlp._modules["act_fn"])
    if type(features) is not int or type(scale) is not float or type(index) is not int or activation is None:
        return None
    query, key, _, _, gate, _, _ = linears.values()
    heads, key_heads = query.out_features // features, key.out_features // features
    width, hidden = query.in_features, gate.out_features
    expected = (
        (width, heads * features),
        (width, key_heads * features),
        (width, key_heads * features),
        (heads * features, width),
        (width, hidden),
        (width, hidden),
        (hidden, width),
    )
    if tuple((linear.in_features, linear.out_features) for linear in linears.values()) != expected:
        return None
    if features % 2 or key_heads == 0 or heads % key_heads:
        return None
    rules = tuple(None if named is None else _rule_of(named[1]) for named in norms)
    widths = (width, features, features, width, width, width)
    weights = [linear._parameters["weight"] for linear in linears.values()]
    for named, rule, size in zip(norms, rules, widths, strict=True):
        if named is None:
            continue
        if rule is None or named[1]._parameters["weight"].shape != (size,):  # type: ignore[union-attr]
            return None
        weights.append(named[1]._parameters["weight"])
    if len({weight.dtype for weight in weights}) != 1:
        return None
    sizes = heads, key_heads, features
    return Parts(linears, norms, rules, sizes, scale, index, width, (hidden, activation), weights[0].dtype)


def _activation_of(function: Any) -> int | None:
    """The number of the activation that this computes."""
    x = torch.linspace(-90, 90, 3601, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        try:
            found = function(x)
        except Exception:  # an activation of another kind
            return None
    for number, name in enumerate(decoder.ACTIVATIONS):
        if isinstance(found, Tensor) and torch.allclose(found, PLAIN_ACTIVATIONS[name](x), rtol=1e-6, atol=1e-7):
            return number
    return None


def _is_pair(turned: Any) -> bool:
    return isinstance(turned, tuple) and len(turned) == 2 and all(isinstance(angles, Tensor) for angles in turned)
