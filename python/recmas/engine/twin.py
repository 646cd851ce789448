"""A decoder's first layers alone, in float32: what a cache, a mask or a kept state does shows there as in all of it.

In bfloat16, and through dozens of layers, rounding hides what a wrong state changes. A few layers in float32 show it,
cost a fraction of the time, and share no tensor with a model that may be at work meanwhile.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 1_000_000_000
"""Parameters of the largest twin: 4 GB for as long as a proof runs."""


def twin(decoder: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy of the decoder's first layers, at least one of each kind, and of all that is not a layer.

    The decoder itself where it cannot be cut so: layers that are no list, quantised or scattered weights, layers of one
    kind only at the end, or layers too large to copy. Proofs then run on all of it, in its own dtype.
    """
    try:
        return _cut(decoder) or decoder
    except Exception:  # a decoder that resists copying is proved as it is
        return decoder


def _cut(decoder: PreTrainedModel) -> PreTrainedModel | None:
    count = int(decoder.config.num_hidden_layers)
    kept = min(_first_of_each(decoder.config, count), count)
    lists = [(name, part) for name, part in decoder.named_children() if _is_layers(part, count)]
    if not lists or getattr(decoder.config, "num_kv_shared_layers", 0):
        return None
    table = decoder.get_input_embeddings()
    dropped = [layer for _, part in lists for layer in list(part)[kept:]]
    shared = {id(weight) for weight in table.parameters()}
    weights = {
        id(weight): weight
        for part in decoder.modules()
        for weight in part._parameters.values()
        if weight is not None and id(weight) not in shared
    }
    gone = {id(weight) for layer in dropped for weight in layer.parameters()}
    left = [weight for key, weight in weights.items() if key not in gone]
    if sum(weight.numel() for weight in left) > LARGEST or any(_unusual(weight) for weight in left):
        return None
    config = _shorter(decoder.config, count, kept)
    memo: dict[int, Any] = {id(table): table, id(decoder.config): config}
    memo.update((id(layer), None) for layer in dropped)
    copied: PreTrainedModel = copy.deepcopy(decoder, memo)
    for name, part in lists:
        setattr(copied, name, nn.ModuleList(list(getattr(copied, name))[:kept]))
    for part in copied.modules():
        if part is not table:
            _to_float32(part)
    return copied


def _to_float32(part: nn.Module) -> None:
    for held in (part._parameters, part._buffers):
        for name, tensor in held.items():
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                held[name] = _cast(tensor)


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    cast = tensor.detach().float()
    return nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast


def _is_layers(part: nn.Module, count: int) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) == count


def _unusual(weight: torch.Tensor) -> bool:
    return weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _first_of_each(config: PreTrainedConfig, count: int) -> int:
    """Layers up to the first one of the last kind, two at least."""
    needed = 2
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) == count:
            needed = max(needed, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    return needed


def _shorter(config: PreTrainedConfig, count: int, kept: int) -> PreTrainedConfig:
    """The configuration of the first layers."""
    shorter = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(shorter, name, value[:kept])
    shorter.num_hidden_layers = kept
    return shorter
