"""In which tiles the candidates form a product, and what the copy engine takes. Arithmetic: nothing here was timed."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from recmas_kernels.backends.triton import plan


class MatmulConfig(NamedTuple):
    """Tile of a product: rows and columns of the result, depth per step, warps, pipeline stages, and which kernel."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    persistent: bool = False

    def options(self) -> dict[str, int]:
        """What every launch of a kernel in these tiles is given."""
        tile = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {**tile, "num_warps": self.warps, "num_stages": self.stages}


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent grid the device runs at once, one per SM."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _A_WAVE


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


EVEN_BYTES = 16  # what the copy engine wants rows to be multiples of


def even(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of ``width`` elements suit the copy engine."""
    return width * dtype.itemsize % EVEN_BYTES == 0


def no_copy_engine(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `persistent` serves nothing in ``dtype`` on the device; None if it can."""
    if dtype == torch.float32:
        return "exact float32 products have no use for tensor descriptors"
    if torch.version.hip is not None:
        return "ROCm has no tensor descriptors"
    capability = _capability(device)
    if capability < (9, 0):
        return f"sm_{capability[0]}{capability[1]} has no tensor descriptors; sm_90 is the first with them"
    if not plan._roomy(device):
        return f"a program has {plan._shared_memory(device) // 1024} KB of shared memory, its tiles take 200"
    return None


def tiles(rows: int, columns: int, config: MatmulConfig) -> int:
    """How many tiles a result ``[rows, columns]`` is cut into."""
    return -(-rows // config.rows) * -(-columns // config.columns)


_NARROW = [MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(128, 128, 32, 4, 4), MatmulConfig(64, 128, 64, 4, 3)]
_EXACT = [MatmulConfig(64, 64, 16, 8, 2), MatmulConfig(128, 64, 16, 8, 2)]  # float32 without tensor cores
_A_WAVE = 132  # tiles that fill an H100


def matmul_configs(
    results: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, *, wide: bool = True
) -> list[MatmulConfig]:
    """Tiles for the results ``(rows, columns)`` of one launch, the default first.

    A tile of 128 x 256 reads a quarter less than two of 128 x 128, but a device must have enough of them to fill it.
    ``wide=False`` for an epilogue that leaves it too few registers to share an SM.
    """
    if dtype == torch.float32:
        return _EXACT
    # Without wgmma both operands pass through registers, and a depth of 64 leaves none to spare.
    widest = MatmulConfig(128, 256, 64 if plan._roomy(device) else 32, 8, 3)
    enough = sum(tiles(rows, columns, widest) for rows, columns in results) >= _A_WAVE
    return [widest, *_NARROW] if enough and wide else [*_NARROW, widest]


def persistent_configs() -> list[MatmulConfig]:
    """Tiles of the persistent kernel."""
    return [
        MatmulConfig(128, 256, 64, 8, 4, persistent=True),
        MatmulConfig(128, 256, 64, 8, 3, persistent=True),
        MatmulConfig(128, 128, 64, 8, 4, persistent=True),
    ]


def choose(
    results: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, *, wide: bool, described: bool
) -> MatmulConfig:
    """The tile of a launch: the widest persistent one where the copy engine takes the operands."""
    return persistent_configs()[0] if described else matmul_configs(results, dtype, device, wide=wide)[0]
