"""Decoders of known models, one position at a time: all their layers in one call of the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recmas_kernels.decoder.layer import LayerKernel
from recmas_kernels.decoder.run import Known, Together
from recmas_kernels.observed import observed
from recmas_kernels.own_forward import OwnForward
from recmas_kernels.watch import CALLS, HOOKS, INNER, Watched, is_own

KNOWN = {
    f"transformers.models.{room}.modeling_{room}.{name}Model"
    for room, name in {
        "gemma": "Gemma",
        "gemma3": "Gemma3Text",
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
    }.items()
}
"""Classes of decoders whose code was read: a call with some arguments cannot see what others make it do."""
_TAKEN = {
    "attention_mask",
    "cache_position",
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}
_LOOKS = 8


class ModelKernel(OwnForward):
    """The ``forward`` of one decoder: its class's, whose layers run in one call of the kernels at one position.

    The class finds stand-ins in the layers' places, which put them off until the last of them (`Together`). That
    nothing happens between them, and that the class writes no attribute, is found by a call of it with other stand-ins,
    and looked at again whenever the model's attributes, its configuration, its layers, their hooks or what calls them
    have changed.

    Args:
        model: a decoder, whose layers run as kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._looks = _LOOKS
        self._known: Known | None = None

    def look(self) -> bool:
        self._known = None
        self._looks -= 1
        model = self.module
        kind = type(model)
        if f"{kind.__module__}.{kind.__qualname__}" not in KNOWN or not is_own(kind, kind.forward):
            return False
        watched = _watched(model)  # first: what changes from here on is seen
        layers = _in_order(model)
        self._known = Known(layers, watched)
        return bool(layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        known = None
        if not (torch.is_grad_enabled() or observed() or _has_any_global_hook()) and _is_one_position(args, kwargs):
            known = self._unchanged()
        if known is None:
            return type(model).forward(model, *args, **kwargs)
        together = Together(known)
        with together.open():
            return type(model).forward(_with(model, together.stand_ins), *args, **kwargs)

    def _unchanged(self) -> Known | None:
        """What is known of the model as it is now, if its layers follow each other."""
        if self._looks <= 0:
            return None
        known = self._known  # another thread may look meanwhile
        if known is None or not known.watched.unchanged() or not begins_with(self.module, known.layers):
            self.look()
            known = self._known
        return known if known is not None and known.layers else None


def _watched(model: nn.Module) -> Watched:
    """What the order of a decoder's layers depends on."""
    held, layers = model.__dict__, model._modules.get("layers")
    itself = weakref.ref(model)  # its own dictionary holds this
    config = getattr(held.get("config"), "__dict__", {})
    entries: list[tuple[Any, str, Any]] = [
        (itself, name, value) for name, value in held.items() if name not in INNER | {"forward"}
    ]
    entries += [(itself, "_modules", model._modules), (model._modules, "layers", layers)]
    entries += [(config, name, value) for name, value in config.items()]
    sizes: list[tuple[Any, int]] = [(config, len(config)), (itself, len(held))]
    kinds: list[tuple[Any, type, Any]] = [(itself, type(model), None)]
    classes: list[tuple[type, str, Any]] = [(type(model), "forward", type(model).forward)]
    if isinstance(layers, nn.Module):
        kinds.append((layers, type(layers), layers.__dict__))
        entries.append((layers.__dict__, "_modules", layers._modules))
        sizes.append((layers._modules, len(layers._modules)))
        for name, layer in layers._modules.items():
            entries.append((layers._modules, name, layer))
            own = {} if layer is None else layer.__dict__
            entries += [(own, key, own[key]) for key in ("forward", *HOOKS) if key in own]
            sizes.append((own, len(own)))  # one that is compiled has an attribute more
            sizes += [(own[key], len(own[key])) for key in HOOKS if key in own]
        for kind in {type(layer) for layer in layers.children()}:
            classes += [(kind, name, getattr(kind, name)) for name in CALLS]
    return Watched(*(tuple(item for each in group for item in each) for group in (entries, sizes, kinds, classes)))


def begins_with(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether a decoder's first layers are these: the same dictionary may have come to another order."""
    return not layers or [*model._modules["layers"]._modules.values()][: len(layers)] == layers  # type: ignore[union-attr]


def _is_one_position(args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether a decoder is given one token or embedding per row, and nothing that asks for more than its result."""
    others = (given[name] for name in given.keys() - _TAKEN)
    if args or any(value is not None and value is not False for value in others):
        return False
    fed = given.get("inputs_embeds", given.get("input_ids"))
    return isinstance(fed, Tensor) and fed.dim() > 1 and fed.shape[1] == 1


def _with(model: nn.Module, layers: tuple[Any, ...]) -> nn.Module:
    """The model itself, but for what its class finds in ``layers``."""
    made: nn.Module = object.__new__(type(model))
    made.__dict__.update(model.__dict__, layers=layers)
    made.__dict__["_modules"] = {name: part for name, part in model._modules.items() if name != "layers"}
    return made


def _in_order(model: nn.Module) -> list[nn.Module]:
    """The layers as the decoder's class calls them; none if something may happen between them."""
    layers = model._modules.get("layers")
    if type(layers) is not nn.ModuleList or not layers or any(map(_by_itself, layers)):
        return []
    if not all(is_own(nn.Module, getattr(type(layer), name)) for layer in layers for name in CALLS):
        return []
    gains = layers[0].get_parameter("input_layernorm.weight")
    x = torch.ones(1, 1, gains.shape[0], dtype=gains.dtype, device=gains.device)
    order = _Order(list(layers), x)
    shadow = _unseen(model, {"layers"})
    shadow.layers = nn.ModuleList(order.stand_ins)
    before = dict(shadow.__dict__)
    try:
        with torch.no_grad(), order:
            found = type(model).forward(shadow, inputs_embeds=x, use_cache=False)
    except Exception:  # a decoder of another kind, which takes other arguments
        return []
    keeps = before.keys() == shadow.__dict__.keys() and all(shadow.__dict__[name] is before[name] for name in before)
    holds = keeps and order.holds(dict(found) if isinstance(found, dict) else found)
    return order.called if holds and order.called == [*layers][: len(order.called)] else []


def _unseen(module: nn.Module, without: set[str]) -> nn.Module:
    """A copy that shares weights and attributes; what a call of it does to hooks and buffers does not come back.

    Args:
        module: with its parts.
        without: names of parts that the copy lacks.
    """
    made: nn.Module = object.__new__(type(module))
    own = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_compiled_call_impl")}
    made.__dict__.update({**own, **nn.Module().__dict__, "training": module.training})
    made.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    for name, part in module._modules.items():
        if name not in without:
            made._modules[name] = None if part is None else _unseen(part, set())
    return made


def _by_itself(layer: nn.Module) -> bool:
    """Whether a layer runs as its class says, or is seen by hooks."""
    seen = layer._forward_hooks or layer._forward_pre_hooks or layer._compiled_call_impl is not None
    return bool(seen) or not isinstance(layer.__dict__.get("forward"), LayerKernel)


class _Order(TorchDispatchMode):
    """Which layers are called one after the other, by stand-ins for them, and whether operators run between them.

    Args:
        layers: of the model.
        x: rows as each of them returns.
    """

    def __init__(self, layers: list[nn.Module], x: Tensor) -> None:
        super().__init__()
        self.called: list[nn.Module] = []
        self._results = [x.clone() for _ in layers]
        self._chained, self._between, self._operators = True, 0, 0
        self.stand_ins = [self._stand_in(layer) for layer in layers]

    def _stand_in(self, layer: nn.Module) -> nn.Module:
        def forward(x: Tensor, **given: Any) -> Tensor:
            if self.called:
                self._chained &= x is self._results[len(self.called) - 1]
                self._between += self._operators
            self._operators = 0
            self.called.append(layer)
            return self._results[len(self.called) - 1]

        made = _unseen(layer, set(layer._modules))
        made.__dict__["forward"] = forward
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operators += 1
        return func(*args, **(kwargs or {}))

    def holds(self, returned: Any) -> bool:
        """Whether each layer is called once, of what the one before it returned, and nobody else is given that."""
        given = set(map(id, tree_leaves(returned)))
        alone = not any(id(result) in given for result in self._results[: len(self.called) - 1])
        return self._chained and not self._between and alone and len(set(self.called)) == len(self.called)
