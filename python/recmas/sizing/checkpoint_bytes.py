"""How many parameters a checkpoint holds, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from recmas.files.safetensors_header import stored_tensors

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
PANEL = 48  # rows of a packed matrix are filled up to a multiple of this, or of less (csrc/cpu/tile.h, kPanel)
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
        panels: floating elements once matrices are packed for the CPU kernels (`recmas_kernels.accelerate`), at most.
    """

    parameters: int
    floating: int
    packed: int
    stored: int
    dtype: str
    panels: int

    def bytes_in(self, dtype: str, accelerated: bool = False) -> int:
        """Bytes once loaded in `dtype`, or as stored for "auto"; `accelerated`: and packed for the CPU kernels."""
        width = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(dtype)
        if width is None:
            return self.stored
        return (self.panels if accelerated and dtype != "float64" else self.floating) * width + self.packed


def checkpoint_bytes(folder: Path) -> CheckpointBytes:
    """The weights of a model or link in `folder`.

    Raises:
        ValueError: as `recmas.files.safetensors_header.stored_tensors`.
    """
    counts: dict[str, int] = {}
    filled = 0
    for tensor in stored_tensors(folder):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
        if len(tensor.shape) == 2 and tensor.dtype in NAMES:
            filled += -tensor.shape[0] % PANEL * tensor.shape[1]
    weights = summed(counts)
    return replace(weights, panels=weights.floating + filled)


def summed(counts: dict[str, int]) -> CheckpointBytes:
    """The weights of so many parameters by safetensors' name of their dtype; their shapes are not known."""
    most = max(counts, key=lambda kind: counts[kind], default="F32")
    floating = sum(count for kind, count in counts.items() if kind in NAMES)
    stored = {kind: count * BYTES.get(kind, 1) for kind, count in counts.items()}
    packed = sum(size for kind, size in stored.items() if kind not in NAMES)
    return CheckpointBytes(
        sum(counts.values()), floating, packed, sum(stored.values()), NAMES.get(most, most), floating
    )
