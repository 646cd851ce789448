"""Loading a causal language model and its tokenizer from a folder or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from recmas.agents.model_folder import check_model_folder
from recmas.dtypes import DTYPES


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = Path(source)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise ValueError(f"agent {name!r}: {source} is a PEFT adapter; merge it into its base model first")
    elif folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ValueError(f"agent {name!r}: no such folder: {source}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
    weights: dict[str, Any] = {}
    if root is not None and folder.is_dir():
        check_model_folder(folder, root, f"agent {name!r}", trust_remote_code)
        weights["use_safetensors"] = True  # never a pickle
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, **options, **weights, **_past_links(source)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"agent {name!r}: {source} needs code of its own to be run; if you trust it, allow that with "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        where = source if folder.is_dir() else f"{source} (no such folder, so a model on the hub)"
        raise ValueError(f"agent {name!r}: cannot load {where}: {_first_line(error)}") from error
    return model.to(device), tokenizer


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
