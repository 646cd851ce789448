"""Whether a link's children are the plain layers whose weights the kernels may read, instead of calling the layers.

Anything else that torch and its users put in a layer's place, or around it, has a meaning of its own: subclasses (LoRA,
quantisation-aware training), parametrizations, pruning, hooks, a ``forward`` set on the instance (offloading), tensors
and modes with a ``__torch_function__`` of their own. Such a link runs its children, as the eager module does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.modules.module as modules
from torch import Tensor, nn

from recmas_kernels.config import NORM_NAMES, LinkConfig
from recmas_kernels.replaced import functions_replaced, has_functions

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN = (nn.Parameter, Tensor, type(None))
_GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = tuple(getattr(modules, f"_global{name}") for name in _HOOKS)


def layers_of(config: LinkConfig) -> dict[str, type[nn.Module]]:
    """Name and type of every layer of a two-layer link."""
    linears = ("proj1", "proj2", "residual_proj") if config.residual == "linear" else ("proj1", "proj2")
    norms = NORM_NAMES[config.kind] if config.norm else ()
    return dict.fromkeys(linears, nn.Linear) | dict.fromkeys(norms, nn.LayerNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would call hooks of its own."""
    return any(getattr(module, name) for name in _HOOKS)


def why_not_plain(children: Mapping[str, Any], config: LinkConfig) -> str | None:
    """Which child of a two-layer link is no plain layer, and why; None if all are."""
    if any(_GLOBAL_HOOKS):
        return "hooks for all modules are registered"
    if functions_replaced():
        return "torch's functions are replaced, or a function mode may replace them"
    for name, layer in layers_of(config).items():
        child = children.get(name)
        if child is None:
            return f"{name} is missing"
        if type(child) is not layer:
            return f"{name} is a {type(child).__module__}.{type(child).__qualname__}"
        if has_hooks(child):
            return f"{name} has hooks"
        if "forward" in child.__dict__:
            return f"{name} has a forward of its own"
        if "weight" in child.__dict__ or child._parameters.get("weight") is None:
            return f"{name} has no parameter weight"
        if "bias" in child.__dict__ or "bias" not in child._parameters:
            return f"{name} has no parameter bias"
        for key, parameter in child._parameters.items():
            if has_functions(parameter):
                return f"{name}.{key} is a {type(parameter).__qualname__}, which may replace torch's functions"
    if config.norm:
        name_in, name_out = NORM_NAMES[config.kind]
        eps_in, eps_out = children[name_in].eps, children[name_out].eps
        if eps_in != eps_out:
            return f"{name_in} and {name_out} have different eps: {eps_in} and {eps_out}"
    return None


class PlainLayers:
    """A link's plain children as they were found, so that a call sees within 1 us whether they still are."""

    __slots__ = ("_children", "_eps", "_hooks", "_layers", "_norms", "_parameters")

    def __init__(self, children: Mapping[str, Any], config: LinkConfig) -> None:
        layers = {name: children[name] for name in layers_of(config)}
        self._eps, self._children = config.eps, list(children.values())
        self._layers = tuple((child, type(child), child.__dict__) for child in layers.values())
        self._hooks = (*_GLOBAL_HOOKS, *(getattr(child, hooks) for child in layers.values() for hooks in _HOOKS))
        self._norms: Any = tuple(layers[name] for name in NORM_NAMES[config.kind]) if config.norm else None
        norm_in, norm_out = NORM_NAMES[config.kind]
        self._parameters: tuple[Any, ...] = tuple(
            layers[name]._parameters if name in layers else None
            for name in ("proj1", "proj2", "residual_proj", norm_in, norm_out)
        )

    def tensors(self, children: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """``(w1, b1, w2, b2, w3, b3, norm_in, norm_out, eps)``; None if ``children`` are others, or plain no longer."""
        if any(self._hooks) or functions_replaced() or list(children.values()) != self._children:
            return None
        for child, layer, attributes in self._layers:
            if type(child) is not layer or "forward" in attributes:
                return None
            for parameter in attributes["_parameters"].values():
                if type(parameter) not in _PLAIN and has_functions(parameter):
                    return None
        try:
            return self.read()
        except KeyError:  # a parameter was moved elsewhere, as FSDP does
            return None

    def read(self) -> tuple[Any, ...] | None:
        """As `tensors`, of children that are known to be the same."""
        proj1, proj2, residual, norm_in, norm_out = self._parameters
        w3 = b3 = ins = outs = None
        if residual is not None:
            w3, b3 = residual["weight"], residual["bias"]
        eps = self._eps
        if norm_in is not None:
            ins, outs = (norm_in["weight"], norm_in["bias"]), (norm_out["weight"], norm_out["bias"])
            first, second = self._norms
            eps = first.eps
            if eps != second.eps or ins[0] is None or outs[0] is None:
                return None
        return proj1["weight"], proj1["bias"], proj2["weight"], proj2["bias"], w3, b3, ins, outs, eps
