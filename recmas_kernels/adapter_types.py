"""The reference implementation's link types: a link's `LinkConfig` from its parameter names, shapes and type name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from recmas_kernels.config import NORM_NAMES, LinkConfig

# adapter_type -> (layers, residual, norm), from the reference implementation's type tables.
_INNER = {
    "linear_adapter": (1, "none", False),
    "linear_res_adapter": (1, "identity", False),
    "adapter": (2, "none", False),
    "res_adapter": (2, "identity", False),
    "ln_res_adapter": (2, "identity", True),
}
_OUTER = {
    "outer_linear_adapter": (1, "none", False),
    "outer_linear_res_adapter": (1, "linear", False),
    "outer_adapter": (2, "none", False),
    "outer_res_adapter": (2, "linear", False),
    "outer_ln_adapter": (2, "none", True),
    "outer_ln_res_adapter": (2, "linear", True),
}
_ALIASES = {
    "1layer": "linear_adapter",
    "1layer_res": "linear_res_adapter",
    "2layer": "adapter",
    "2layer_res": "res_adapter",
    "2layer_ln_res": "ln_res_adapter",
}


def infer_config(state: Mapping[str, Tensor], adapter_type: str | None = None) -> LinkConfig:
    """The shape of a link with these parameters.

    Args:
        state: its parameters by name.
        adapter_type: its type name or alias. An inner link without norms has the same parameters with and without a
            residual, so such a link needs one.

    Raises:
        ValueError: the type is unknown, missing where it is needed, or does not fit the parameters.
        TypeError: a parameter is no tensor.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"key {key!r} holds a {type(value).__name__}, expected a tensor")
    if "proj1.weight" not in state:
        raise ValueError("key 'proj1.weight' is missing: not a RecursiveLink")
    for key in ("proj1.weight", "proj2.weight"):
        if key in state and state[key].dim() != 2:
            raise ValueError(f"key {key!r} has shape {tuple(state[key].shape)}, expected two dimensions")
    layers = 2 if "proj2.weight" in state else 1
    norms = [kind for kind, names in NORM_NAMES.items() if f"{names[0]}.weight" in state]
    if adapter_type is None:
        kind, residual, norm = _infer_type(state, norms)
    else:
        kind, layers_named, residual, norm = _lookup(adapter_type, state, norms)
        if layers_named != layers:
            raise ValueError(f"adapter_type {adapter_type!r} has {layers_named} layer(s), the parameters have {layers}")
        if norms != ([kind] if norm else []):
            wanted = f"needs {' and '.join(NORM_NAMES[kind])}" if norm else "has no norms"
            raise ValueError(f"adapter_type {adapter_type!r} {wanted}, the parameters differ")
    hidden, in_features = state["proj1.weight"].shape
    out_features = hidden if layers == 1 else state["proj2.weight"].shape[0]
    return LinkConfig(
        kind, in_features, hidden, out_features, residual, norm, bias="proj1.bias" in state, layers=layers
    )


def _infer_type(state: Mapping[str, Tensor], norms: list[str]) -> tuple[str, str, bool]:
    linear = "residual_proj.weight" in state
    if norms == ["inner"]:
        return "inner", "identity", True
    if norms == ["outer"] or linear:
        return "outer", "linear" if linear else "none", bool(norms)
    raise ValueError(
        "the parameters do not say whether the link has a residual: pass adapter_type "
        f"(one of {', '.join([*_INNER, *_OUTER])})"
    )


def _lookup(adapter_type: str, state: Mapping[str, Tensor], norms: list[str]) -> tuple[str, int, str, bool]:
    name = adapter_type
    if name in _ALIASES:  # inner and outer types share aliases
        outer = "residual_proj.weight" in state or "outer" in norms
        name = ("outer_" if outer else "") + _ALIASES[name]
    if name in _INNER:
        return ("inner", *_INNER[name])
    if name in _OUTER:
        return ("outer", *_OUTER[name])
    raise ValueError(
        f"unknown adapter_type {adapter_type!r}: expected one of {', '.join([*_INNER, *_OUTER, *_ALIASES])}"
    )


def with_eps_of(module: nn.Module, config: LinkConfig) -> LinkConfig:
    """``config`` with the epsilon of the module's own norms, which its parameters do not show."""
    norms = [getattr(module, name) for name in NORM_NAMES[config.kind]] if config.norm else []
    epsilons = sorted({getattr(norm, "eps", config.eps) for norm in norms})
    if len(epsilons) > 1:
        raise ValueError(f"the norms have different eps: {' and '.join(map(str, epsilons))}")
    return replace(config, eps=epsilons[0]) if epsilons else config
