"""Loading a causal language model and its tokenizer from a folder, a GGUF file or the hub."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers

from recmas.agents.body import body_of
from recmas.agents.classes import class_of
from recmas.agents.model_folder import check_model_folder
from recmas.dtypes import DTYPES
from recmas.errors import first_line


def load_model(
    source: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    trust_remote_code: bool,
    name: str,
    root: Path | None = None,
    offline: bool = False,
) -> tuple[Any, Any]:
    """Model on `device` and tokenizer; see `Agent.from_pretrained`."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import is_gguf_available

    wanted = read_dtype(dtype) or "auto"
    where, gguf = gguf_parts(source)
    folder = Path(where)
    if gguf and folder.is_dir() and not (folder / gguf).is_file():
        raise ValueError(f"agent {name!r}: no such file: {folder / gguf}")
    if folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise ValueError(f"agent {name!r}: {source} is a PEFT adapter; merge it into its base model first")
    elif folder.is_absolute() or where.startswith(".") or where.count("/") > 1:
        raise ValueError(f"agent {name!r}: no such folder: {where}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
    weights: dict[str, Any] = {}
    if root is not None and folder.is_dir():
        check_model_folder(folder, root, f"agent {name!r}", trust_remote_code)
        weights["use_safetensors"] = True  # never a pickle
    if gguf:
        options["gguf_file"] = gguf
        if hasattr(transformers, "GgufConfig"):  # newer versions would keep the file's blocks
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(where, **options)
        model, info = class_of(config).from_pretrained(
            where, dtype=wanted, output_loading_info=True, **options, **weights, **_past_links(where)
        )
        _check_complete(model, info["missing_keys"])
        if gguf and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)  # its weights are plain, and can be saved
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"agent {name!r}: {source} needs code of its own to be run; if you trust it, allow that with "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        if gguf and not is_gguf_available():
            raise ValueError(
                f"agent {name!r}: {source}: GGUF files are read by the gguf package: pip install 'recmas-kernels[gguf]'"
            ) from error
        shown = source if folder.is_dir() else f"{source} (no such folder, so a model on the hub)"
        raise ValueError(f"agent {name!r}: cannot load {shown}: {first_line(error)}") from error
    return model.to(device), tokenizer


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that is meant by it or by its name; None is the checkpoint's own, "auto".

    Raises:
        ValueError: another name, or a dtype of other than floating-point numbers.
    """
    if isinstance(dtype, torch.dtype):
        if dtype.is_floating_point:
            return dtype
    elif dtype in (None, "auto"):
        return None
    elif dtype in DTYPES:
        return getattr(torch, dtype)
    raise ValueError(f"dtype: {str(dtype)!r} is not one of {', '.join(DTYPES)}")


def is_gguf(source: str) -> bool:
    """Whether a source names a GGUF file; a system keeps such a model's weights as plain ones."""
    return source.endswith(".gguf")


def gguf_parts(source: str) -> tuple[str, str]:
    """Folder or hub id, and file, of ``FILE.gguf`` or ``FOLDER-OR-ID:FILE.gguf``; no file for any other source."""
    if not is_gguf(source):
        return source, ""
    where, colon, file = source.rpartition(":")
    return (where, file) if colon else (str(Path(source).parent), Path(source).name)


def _check_complete(model: Any, missing: Collection[str]) -> None:
    """Raise ValueError if the checkpoint lacks weights of the body or the head, which transformers makes up then."""
    try:
        parts = (body_of(model), model.get_output_embeddings())
    except (ValueError, NotImplementedError):  # which refuses the model by itself
        return
    used = [path for path, part in model.named_modules() if part in parts]
    lacking = sorted(name for name in missing if any(name.startswith(f"{path}.") for path in used))
    if lacking:
        raise ValueError(
            f"{len(lacking)} weights of {type(model).__name__} are not in the checkpoint, {lacking[0]} among them"
        )


def _past_links(source: str) -> dict[str, Any]:
    """Options that keep transformers, where PEFT is installed, from taking a link beside a model for a PEFT adapter."""
    from transformers.utils import find_adapter_config_file

    path = find_adapter_config_file(source)
    if path is None:
        return {}
    described = json.loads(Path(path).read_text(encoding="utf-8"))
    if "adapter_type" not in described or "peft_type" in described:
        return {}
    return {"adapter_kwargs": {"subfolder": "no-peft-adapter"}}  # where it looks for one and finds none
