"""A decoder's first layers alone, in float32: what a cache, a mask or a kept state does shows there as in all of it.

In bfloat16, and through dozens of layers, rounding hides what a wrong state changes. A few layers in float32 show it,
cost a fraction of the time, and share no tensor with a model that may be at work meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 1_000_000_000
"""Parameters of the largest twin: 4 GB for as long as a proof runs."""
WINDOW = 4
"""Positions that a sliding window of a twin sees at most, so that a dozen tokens pass it."""


def twins(decoder: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """What proofs may run on, the best first: the first layers in float32, all layers in float32, the decoder itself.

    The first layers are one of each kind at least: made of other parts or keeping another cache; where these are too
    large, keeping another cache. A model that computes with fewer layers than its configuration says, or whose layers
    share what others keep, raises, and the next twin serves. None is made of quantised weights, nor one of more
    parameters than `LARGEST`.
    """
    # A configuration of another kind, or weights without a copy.
    with contextlib.suppress(TypeError, AttributeError, NotImplementedError):
        yield from _copies(decoder)
    yield decoder


def _copies(decoder: PreTrainedModel) -> Iterator[PreTrainedModel]:
    if getattr(decoder.config, "hidden_size_per_layer_input", 0):
        return  # its inputs per layer come from the token table, which a copy leaves out
    count = int(decoder.config.num_hidden_layers)
    lists = [path for path, part in decoder.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if lists and not getattr(decoder.config, "num_kv_shared_layers", 0):
        kinds = _kinds(decoder.config, count)
        parts = [(_parts_of(decoder, lists, at), kind) for at, kind in enumerate(kinds)]
        for kept in dict.fromkeys([_first_of_each(parts), _first_of_each(kinds)]):
            yield from _copied(decoder, lists, count, kept)
    yield from _copied(decoder, [], count, count)


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
    # Of zeros: a fresh one would draw from the random state, which is the caller's.
    blank = nn.Embedding.from_pretrained(
        torch.zeros(1, table.weight.shape[1], dtype=torch.float32, device=table.weight.device)
    )
    memo: dict[int, Any] = {id(table): blank, id(decoder.config): config}
    memo.update((id(layer), None) for layer in dropped)
    copied: PreTrainedModel = copy.deepcopy(decoder, memo)
    for path in lists:
        above, _, name = path.rpartition(".")
        setattr(copied.get_submodule(above), name, nn.ModuleList(list(copied.get_submodule(path).children())[:kept]))
    for part in copied.modules():
        _to_float32(part)
        if isinstance(vars(part).get("sliding_window"), int):
            part.sliding_window = min(WINDOW, int(part.sliding_window))
    yield copied.requires_grad_(False)


def _to_float32(part: nn.Module) -> None:
    """Cast what a module holds itself; `float()` would refuse the whole model for one weight of another kind."""
    for name, weight in part._parameters.items():
        if weight is not None and weight.is_floating_point():
            part._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
    for name, buffer in part._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            part._buffers[name] = buffer.float()


def _unusual(weight: torch.Tensor) -> bool:
    return weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _first_of_each(kinds: Sequence[object]) -> int:
    """Layers up to the first one of the last kind, two at least."""
    return min(max(2, *(kinds.index(kind) + 1 for kind in set(kinds))), len(kinds))


def _parts_of(decoder: PreTrainedModel, lists: Sequence[str], at: int) -> frozenset[type]:
    """Classes of all that one layer is made of."""
    layers = (decoder.get_submodule(f"{path}.{at}") for path in lists)
    return frozenset(type(part) for layer in layers for part in layer.modules())


def _kinds(config: PreTrainedConfig, count: int) -> list[object]:
    """What the configuration calls each layer."""
    named = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
    found = next((kinds for kinds in named if isinstance(kinds, list | tuple) and len(kinds) == count), [0] * count)
    return list(found)


def _shorter(config: PreTrainedConfig, count: int, kept: int) -> PreTrainedConfig:
    """The configuration of the first layers."""
    shorter = copy.deepcopy(config)
    if isinstance(getattr(config, "sliding_window", None), int):
        shorter.sliding_window = min(WINDOW, config.sliding_window)
    if kept == count:
        return shorter
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(shorter, name, value[:kept])
    shorter.num_hidden_layers = kept
    return shorter
