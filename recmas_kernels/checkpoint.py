"""Links on disk: our folders (safetensors + config.json) and the reference implementation's checkpoints.

A missing, truncated, wrong-shaped or wrong-version file raises ValueError (or FileNotFoundError) naming the file and
the key. Writing goes to a temporary file that is synced and renamed, so a good file is only ever replaced by a whole
one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recmas_kernels.adapter_types import infer_config, with_eps_of
from recmas_kernels.config import LinkConfig
from recmas_kernels.files import check_regular, replace_file
from recmas_kernels.pickled import read_state_dict

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 1 << 20
_Path = str | os.PathLike[str]


def write_link(directory: _Path, config: LinkConfig, state: Mapping[str, Tensor]) -> None:
    """Write a link's weights and config into ``directory`` (made if absent)."""
    from safetensors.torch import save

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in stored:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        stored.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
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
        source: a state dict, one of its modules or of ours, a ``.pt`` or ``.safetensors`` file, or a role folder with
            ``adapter.pt`` and ``adapter_config.json``.
        adapter_type: its type name or alias; see `infer_config` for where it is needed.

    Raises:
        ValueError: the type is unknown, ambiguous or does not fit the parameters.
    """
    if isinstance(source, nn.Module):
        config, named = getattr(source, "config", None), getattr(source, "adapter_type", None)
        state = dict(source.state_dict())
        if not isinstance(config, LinkConfig):  # one of ours has it
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
