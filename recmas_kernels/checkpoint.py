"""Links on disk: our folders (safetensors + config.json) and the reference implementation's checkpoints.

A missing, truncated, wrong-shaped or wrong-version file raises ValueError (or FileNotFoundError) naming the file and
the key. Writing goes to a temporary file that is synced and renamed, so a good file is only ever replaced by a whole
one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from recmas_kernels.files import check_regular, replace_file
from recmas_kernels.link import NORM_NAMES, LinkConfig
from recmas_kernels.pickled import read_state_dict

if TYPE_CHECKING:
    from recmas_kernels.link import RecursiveLink

    Link = TypeVar("Link", bound=RecursiveLink)

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 1 << 20
_Path = str | os.PathLike[str]

# adapter_type (and its alias) -> (kind, layers, residual, norm), from the reference implementation's type tables.
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


def write_link(directory: _Path, config: LinkConfig, state: Mapping[str, Tensor]) -> None:
    """Write a link's weights and config into ``directory`` (made if absent)."""
    from safetensors.torch import save

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    text = json.dumps({"format": FORMAT, **config.to_dict()}, indent=2) + "\n"
    replace_file(folder / CONFIG, text.encode())


def read_link(source: _Path) -> tuple[LinkConfig, dict[str, Tensor]]:
    """Config and state of a link folder, or of a hub id when no such folder exists."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(source)
    path = folder / CONFIG
    values = _read_json(path)
    version = values.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"{path}: key 'format' is {version!r}, this version reads {FORMAT}")
    try:
        config = LinkConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_size(config, folder / WEIGHTS, path)
    return config, _read_tensors(folder / WEIGHTS)


def _check_size(config: LinkConfig, weights: Path, path: Path) -> None:
    """Raise ValueError if a link of this shape cannot be what the file holds, before anything of its size is made."""
    size = check_regular(weights)
    if config.hidden_features * max(config.in_features, config.out_features if config.layers > 1 else 0) > size:
        shape = f"{config.in_features} > {config.hidden_features} > {config.out_features}"
        raise ValueError(f"{path}: a link of {shape} features does not fit into the {size} bytes of {WEIGHTS}")


def _from_hub(source: _Path) -> Path:
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or os.sep in name.replace("/", ""):
        raise FileNotFoundError(f"no link folder {name}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))


def _read_json(path: Path) -> dict[str, Any]:
    if (size := check_regular(path)) > LARGEST_CONFIG:
        raise ValueError(f"{path} has {size} bytes, at most {LARGEST_CONFIG} are read")
    try:
        values = json.loads(path.read_text())
    except RecursionError:
        raise ValueError(f"{path} is not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a state dict that ``torch.save`` wrote."""
    check_regular(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    try:
        return read_state_dict(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable state dict: {error}") from None


def read_upstream(
    source: _Path | Mapping[str, Tensor] | nn.Module, adapter_type: str | None = None
) -> tuple[LinkConfig, dict[str, Tensor]]:
    """Config and state of a link of the reference implementation.

    Args:
        source: a state dict, one of its modules, a ``.pt`` or ``.safetensors`` file, or a role folder with
            ``adapter.pt`` and ``adapter_config.json``.
        adapter_type: its type name or alias; needed where the parameters do not tell (an inner link without norms may
            or may not have a residual).

    Raises:
        ValueError: the type is unknown, ambiguous or does not fit the parameters.
    """
    if isinstance(source, nn.Module):
        named = getattr(source, "adapter_type", None)
        state = dict(source.state_dict())
        config = infer_config(state, adapter_type or (named if isinstance(named, str) else None))
        return with_eps_of(source, config), state
    if isinstance(source, Mapping):
        state = dict(source)
        return infer_config(state, adapter_type), state
    path = Path(source)
    if path.is_dir():
        path = path / "adapter.pt"
    beside = path.with_name("adapter_config.json")
    if adapter_type is None and path.name.startswith("adapter") and beside.exists():
        adapter_type = _read_json(beside).get("adapter_type")
    state = _read_tensors(path)
    try:
        return infer_config(state, adapter_type), state
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_eps_of(module: nn.Module, config: LinkConfig) -> LinkConfig:
    """``config`` with the epsilon of the module's own norms, which no parameter shows."""
    norms = [getattr(module, name) for name in NORM_NAMES[config.kind]] if config.norm else []
    epsilons = sorted({getattr(norm, "eps", config.eps) for norm in norms})
    if len(epsilons) > 1:
        raise ValueError(f"the norms have different eps: {' and '.join(map(str, epsilons))}")
    return replace(config, eps=epsilons[0]) if epsilons else config


def infer_config(state: Mapping[str, Tensor], adapter_type: str | None = None) -> LinkConfig:
    """The shape of a link of the reference implementation, from its parameters and its type (if known)."""
    if "proj1.weight" not in state:
        raise ValueError("key 'proj1.weight' is missing: not a RecursiveLink")
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
        "the parameters do not tell whether the link has a residual: pass adapter_type "
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


def build(cls: type[Link], config: LinkConfig, state: Mapping[str, Tensor]) -> Link:
    """A ``cls`` of this shape holding ``state`` strictly, in the state's dtype; ValueError names a wrong key."""
    link = cls(config, device="meta")
    expected = {key: value.shape for key, value in link.state_dict().items()}
    for key in sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"key {key!r} is {'missing' if key in expected else 'not expected'} in a link of this shape")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise ValueError(f"key {key!r} has shape {tuple(state[key].shape)}, expected {tuple(shape)}")
    parameters = {key: value.detach().clone() for key, value in state.items()}
    link.load_state_dict(parameters, strict=True, assign=True)
    return link
