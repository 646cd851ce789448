"""Whether a link's children are the plain layers whose weights the kernels may read, instead of calling the layers.

Anything else that torch and its users put in a layer's place, or around it, has a meaning of its own: subclasses (LoRA,
quantisation-aware training), parametrizations, pruning, hooks, a ``forward`` set on the instance (offloading). Such a
link runs its children, as the eager module does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.modules.module as modules
from torch import nn

from recmas_kernels.config import NORM_NAMES, LinkConfig

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
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
    if config.norm:
        name_in, name_out = NORM_NAMES[config.kind]
        eps_in, eps_out = children[name_in].eps, children[name_out].eps
        if eps_in != eps_out:
            return f"{name_in} and {name_out} have different eps: {eps_in} and {eps_out}"
    return None


class PlainLayers:
    """The parameters of a link's plain children, and what shows within 1 us whether they still are its plain children.

    Attributes:
        proj1, proj2, residual_proj, norm_in, norm_out: each child's parameters by name; None for a child that the link
            does not have.
    """

    __slots__ = ("_children", "_eps", "_hooks", "_norms", "norm_in", "norm_out", "proj1", "proj2", "residual_proj")

    def __init__(self, children: Mapping[str, Any], config: LinkConfig) -> None:
        named = {name: children[name] for name in layers_of(config)}
        self._children = tuple((name, child, type(child), child._parameters) for name, child in named.items())
        self._hooks = (*_GLOBAL_HOOKS, *(getattr(child, hooks) for child in named.values() for hooks in _HOOKS))
        self._norms = tuple(named[name] for name in NORM_NAMES[config.kind]) if config.norm else None
        self._eps = config.eps
        self.proj1, self.proj2 = named["proj1"]._parameters, named["proj2"]._parameters
        self.residual_proj = named["residual_proj"]._parameters if config.residual == "linear" else None
        self.norm_in: Any = None
        self.norm_out: Any = None
        if self._norms is not None:
            self.norm_in, self.norm_out = (norm._parameters for norm in self._norms)

    @property
    def eps(self) -> float:
        """That of the norms as they are now."""
        return self._eps if self._norms is None else self._norms[0].eps

    def unchanged(self, children: Mapping[str, nn.Module | None]) -> bool:
        """Whether ``children`` are these layers, and still plain; their parameters may be others by now."""
        for name, child, layer, parameters in self._children:
            if (
                children.get(name) is not child
                or type(child) is not layer
                or "forward" in child.__dict__
                or parameters.get("weight") is None
                or "bias" not in parameters
            ):
                return False
        norms = self._norms
        return not any(self._hooks) and (norms is None or norms[0].eps == norms[1].eps)
