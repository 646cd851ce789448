"""A decoder's first layers alone, in float32: what a cache, a mask or a kept state does shows there as in all of it.

In bfloat16, and through dozens of layers, rounding hides what a wrong state changes. A few layers in float32 show it,
cost a fraction of the time, and share no tensor with a model that may be at work meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 1_000_000_000
"""Parameters of the largest twin: 4 GB for as long as a proof runs."""


def twins(decoder: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """What proofs may run on, the best first: the first layers in float32, all layers in float32, the decoder itself.

    The first layers are at least one of each kind. A model that computes with fewer layers than its configuration says,
    or whose layers share what others keep, raises, and the next twin serves. None is made of quantised weights, nor one
    of more parameters than `LARGEST`.
    """
    try:
        count = int(decoder.config.num_hidden_layers)
        lists = [
            path for path, part in decoder.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
        ]
        if lists and not getattr(decoder.config, "num_kv_shared_layers", 0):
            yield from _copied(decoder, lists, count, min(_first_of_each(decoder.config, count), count))
        yield from _copied(decoder, [], count, count)
    except (TypeError, AttributeError, NotImplementedError):  # a configuration of another kind, weights without a copy
        pass
    yield decoder


def _copied(decoder: PreTrainedModel, lists: Sequence[str], count: int, kept: int) -> Iterator[PreTrainedModel]:
    dropped = [layer for path in lists for layer in list(decoder.get_submodule(path).children())[kept:]]
    table = decoder.get_input_embeddings()
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
        return
    config = _shorter(decoder.config, count, kept)
    blank = nn.Embedding(1, table.weight.shape[1], dtype=torch.float32, device=table.weight.device)
    memo: dict[int, Any] = {id(table): blank, id(decoder.config): config}
    memo.update((id(layer), None) for layer in dropped)
    copied: PreTrainedModel = copy.deepcopy(decoder, memo)
    for path in lists:
        above, _, name = path.rpartition(".")
        setattr(copied.get_submodule(above), name, nn.ModuleList(list(copied.get_submodule(path).children())[:kept]))
    for part in copied.modules():
        _to_float32(part)
    yield copied.requires_grad_(False)


def _to_float32(part: nn.Module) -> None:
    tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
    for held in tables:
        for name, tensor in held.items():
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                held[name] = _cast(tensor)


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    cast = tensor.detach().float()
    return nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast


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
    if kept == count:
        return shorter
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(shorter, name, value[:kept])
    shorter.num_hidden_layers = kept
    return shorter
