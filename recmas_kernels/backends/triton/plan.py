"""Which kernels serve a link over many tokens, and with which tiles: the whole choice on one page.

    small      the whole link in one kernel (`small_hidden`)
    matmul     products with epilogues (`matmul`) between the row passes
    library    torch's own products with one pointwise pass after each (`library`)

None of these numbers has been measured on a GPU yet; they are arithmetic. What a device must answer first:

- small against library for hidden 128, 256 and 512. The small kernel reads both weights out of L2 once per block of
  tokens: at 16384 tokens, 2048 features and hidden 512 with blocks of 64 that is 1.07 GB, about 0.2 ms at 5.5 TB/s,
  more than the 0.16 ms that the separate passes take by bytes. So 512 stays with the library until it is timed.
- small against library for 64 to 4096 tokens: where a handful of programs lose to products that split the weights.
- matmul against library per shape. Epilogues save 8 to 15 % of the bytes-bound share; a product that is 10 % slower
  than the library's loses all of it. So the library is the default wherever the hidden tile does not stay on chip.
- the tile table of `matmul` at 1536 x 1536 x 3584, where 128 x 256 tiles fill 55 % of a wave of 132 SMs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from recmas_kernels.backends.triton import tuning

LIBRARY, SMALL, MATMUL = "library", "small", "matmul"
SMALL_FROM_TOKENS = 512  # tokens from which it is: each program reads both weights, and few programs read slowly
WIDEST_SMALL = 512  # hidden features whose tile fits on chip
SMALL_BY_DEFAULT = 256  # hidden features up to which `small` is the default
LEAST_SHARED_MEMORY = 99 * 1024  # bytes per program that the smaller of the two sets of tiles needs


class SmallConfig(NamedTuple):
    """Tile of `small_hidden`: tokens per program, columns of in and out per step, warps, pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


class MatmulConfig(NamedTuple):
    """Tile of `matmul`: rows and columns of the result, depth per step, warps, pipeline stages, and which kernel."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    persistent: bool = False


class Link(NamedTuple):
    """What the choice of kernels for a link depends on. Sizes count elements; ``norm`` says whether any norm runs."""

    op: str
    device: torch.device
    dtype: torch.dtype
    tokens: int
    in_features: int
    hidden_features: int
    out_features: int
    residual: str
    norm: bool


def refusal(name: str, link: Link) -> str | None:
    """Why variant ``name`` does not compute the link; None if it does."""
    if name == LIBRARY:
        return None
    memory = _shared_memory(link.device)
    if memory < LEAST_SHARED_MEMORY:
        return f"a program has {memory // 1024} KB of shared memory, its tiles take {LEAST_SHARED_MEMORY // 1024}"
    if name == SMALL and link.residual == "linear":
        return "a W3 is a large product of its own"
    if name == SMALL and link.hidden_features > WIDEST_SMALL:
        return f"{link.hidden_features} hidden features do not stay on chip, up to {WIDEST_SMALL} do"
    return None


def reservation(name: str, link: Link) -> str | None:
    """Why variant ``name``, though it computes the link, is not its default; None for the default and `LIBRARY`."""
    if name == MATMUL:
        return "never the default before it has been timed"
    if name == SMALL:
        if any(size % 16 for size in (link.in_features, link.hidden_features, link.out_features)):
            return "masks of sizes that are no multiples of 16 spill registers"
        if link.dtype == torch.float32:
            return "exact float32 products do not use the tensor cores"
        if link.hidden_features > SMALL_BY_DEFAULT:
            return f"above {SMALL_BY_DEFAULT} hidden features it reads more out of L2 than it saves"
        if link.tokens < SMALL_FROM_TOKENS:
            return f"{link.tokens} tokens are few programs, {SMALL_FROM_TOKENS} are enough"
    return None


def candidates(link: Link) -> list[str]:
    """Every variant that computes the link, the default first."""
    able = [name for name in (LIBRARY, MATMUL, SMALL) if refusal(name, link) is None]
    default = SMALL if SMALL in able and reservation(SMALL, link) is None else LIBRARY
    return sorted(able, key=lambda name: name != default)


def describe(link: Link) -> list[str]:
    """Which variant would serve the link and why not the others, a line each; nothing is timed."""
    names = candidates(link)
    tuned = tuning.recall("variant", variant_key(link), link.device)
    chosen = tuned if tuned in names else names[0]
    lines = [f"{chosen}: {'the fastest when tuned on this device' if tuned == chosen else 'the default'}"]
    otherwise = "slower when tuned" if tuned == chosen else "could serve it"
    for name in (LIBRARY, MATMUL, SMALL):
        if name != chosen:
            lines.append(f"{name}: {refusal(name, link) or reservation(name, link) or otherwise}")
    if MATMUL in names:
        lines.append(f"tensor descriptors: {no_copy_engine(link.device, link.dtype) or _uneven(link) or 'fit'}")
    return lines


def _uneven(link: Link) -> str | None:
    sizes = (link.in_features, link.hidden_features, link.out_features)
    rows = [size * link.dtype.itemsize for size in sizes if not even(size, link.dtype)]
    return f"rows of {rows[0]} bytes are no multiple of {EVEN_BYTES}" if rows else None


def variant(link: Link, attempt: Callable[[str], object]) -> str:
    """The default, or what tuning found on this device; ``attempt(name)`` runs the call in a variant, to be timed."""
    return tuning.choose("variant", variant_key(link), link.device, candidates(link), attempt)


def variant_key(link: Link) -> tuple[object, ...]:
    """Under what a tuned variant is kept: token counts within a factor of two share an answer."""
    return (link.op, str(link.dtype), tuning.bucket(link.tokens), *link[4:])


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
    if not _roomy(device):
        return f"a program has {_shared_memory(device) // 1024} KB of shared memory, its tiles take 200"
    return None


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 232448  # 227 KB, an H100's
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _roomy(device: torch.device) -> bool:
    """Whether tiles may be as large as on Hopper, which also feeds them to its tensor cores from shared memory."""
    return _shared_memory(device) >= 200 * 1024


def small_config(hidden_block: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> SmallConfig:
    """The tile for a hidden tile ``hidden_block`` wide: as many tokens as registers hold without spilling.

    The forward keeps its hidden tile whole, as the operand of the second product; the backward takes it in quarters,
    which leaves room for twice the tokens.
    """
    roomy = _roomy(device)
    if dtype == torch.float32:
        return SmallConfig(16 if hidden_block > 256 else 32, 32, 8, 2)
    if hidden_block > 256:
        return SmallConfig(64 if backward and roomy else 32, 64 if roomy else 32, 8, 2)
    if hidden_block > 128:
        return SmallConfig(128 if backward and roomy else 64, 64 if roomy else 32, 8, 2 if backward or not roomy else 3)
    return SmallConfig(128 if roomy else 64, 64, 8, 2)


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
    widest = MatmulConfig(128, 256, 64 if _roomy(device) else 32, 8, 3)
    enough = sum(tiles(rows, columns, widest) for rows, columns in results) >= _A_WAVE
    return [widest, *_NARROW] if enough and wide else [*_NARROW, widest]


def persistent_configs() -> list[MatmulConfig]:
    """Tiles of the persistent kernel: tried when tuning, never the default before it has been timed."""
    return [
        MatmulConfig(128, 256, 64, 8, 4, persistent=True),
        MatmulConfig(128, 256, 64, 8, 3, persistent=True),
        MatmulConfig(128, 128, 64, 8, 4, persistent=True),
    ]
