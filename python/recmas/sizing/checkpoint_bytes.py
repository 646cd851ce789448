"""How many parameters a checkpoint holds, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
LONGEST_HEADER = 100_000_000  # safetensors' own limit
NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class CheckpointBytes:
    """Of a checkpoint.

    Attributes:
        parameters: their number.
        floating: those of them that loading casts.
        packed: bytes of the others, as quantised weights are stored and stay.
        stored: bytes of all, as stored.
        dtype: of most.
    """

    parameters: int
    floating: int
    packed: int
    stored: int
    dtype: str

    def bytes_in(self, dtype: str) -> int:
        """Bytes once loaded in `dtype`, or as stored for "auto"."""
        width = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(dtype)
        return self.stored if width is None else self.floating * width + self.packed


def checkpoint_bytes(folder: Path) -> CheckpointBytes:
    """The weights of a model or link in `folder`.

    Raises:
        ValueError: no safetensors files there, a shard of the index missing, or a file that is cut short or has no
            readable header.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: cannot be read: {error}") from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    counts: dict[str, int] = {}
    for file in files:
        for tensor in _header(file).values():
            kind = str(tensor["dtype"])
            counts[kind] = counts.get(kind, 0) + math.prod(tensor["shape"])
    return summed(counts)


def summed(counts: dict[str, int]) -> CheckpointBytes:
    """The weights of so many parameters by safetensors' name of their dtype."""
    most = max(counts, key=lambda kind: counts[kind], default="F32")
    floating = sum(count for kind, count in counts.items() if kind in NAMES)
    stored = {kind: count * BYTES.get(kind, 1) for kind, count in counts.items()}
    packed = sum(size for kind, size in stored.items() if kind not in NAMES)
    return CheckpointBytes(sum(counts.values()), floating, packed, sum(stored.values()), NAMES.get(most, most))


def _header(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if (size := file.stat().st_size) < whole:
            raise ValueError(f"{size} of {whole} bytes are there")
        return dict(header)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; memory is estimated from safetensors files alone") from None
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: is truncated or no safetensors file: {error}") from None
