"""How many parameters a checkpoint holds, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recmas.files.safetensors_header import stored_tensors

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
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
        ValueError: as `recmas.files.safetensors_header.stored_tensors`.
    """
    counts: dict[str, int] = {}
    for tensor in stored_tensors(folder):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
    return summed(counts)


def summed(counts: dict[str, int]) -> CheckpointBytes:
    """The weights of so many parameters by safetensors' name of their dtype."""
    most = max(counts, key=lambda kind: counts[kind], default="F32")
    floating = sum(count for kind, count in counts.items() if kind in NAMES)
    stored = {kind: count * BYTES.get(kind, 1) for kind, count in counts.items()}
    packed = sum(size for kind, size in stored.items() if kind not in NAMES)
    return CheckpointBytes(sum(counts.values()), floating, packed, sum(stored.values()), NAMES.get(most, most))
