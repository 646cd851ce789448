"""Which kernels serve a link over many tokens, and with which tiles: the whole choice on one page.

    small      the whole link in one kernel (`small_hidden`)
    library    torch's own products with one pointwise pass after each (`library`)

None of these numbers has been measured on a GPU yet; they are arithmetic. What a device must answer first:

- small against library for hidden 128, 256 and 512. The small kernel reads both weights out of L2 once per block of
  tokens: at 16384 tokens, 2048 features and hidden 512 with blocks of 64 that is 1.07 GB, about 0.2 ms at 5.5 TB/s,
  more than the 0.16 ms that the separate passes take by bytes. So 512 stays with the library until it is timed.
- small against library for 64 to 4096 tokens: where a handful of programs lose to products that split the weights.
- one product of joined operands against two, for outer links (`joins`).

Products with epilogues of their own wait in ``benchmarks/gpu/candidates`` for a whole link that they make 5 % faster.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

LIBRARY, SMALL = "library", "small"
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


class Link(NamedTuple):
    """What the choice of kernels for a link depends on. Sizes count elements."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    in_features: int
    hidden_features: int
    out_features: int
    residual: str


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
    able = [name for name in (LIBRARY, SMALL) if refusal(name, link) is None]
    default = SMALL if SMALL in able and reservation(SMALL, link) is None else LIBRARY
    return sorted(able, key=lambda name: name != default)


def describe(link: Link) -> list[str]:
    """Which variant serves the link and why not the other, a line each."""
    chosen = variant(link)
    other = SMALL if chosen == LIBRARY else LIBRARY
    return [
        f"{chosen}: the default",
        f"{other}: {refusal(other, link) or reservation(other, link) or 'could serve it'}",
    ]


def variant(link: Link) -> str:
    """What serves the link."""
    return candidates(link)[0]


def joins(tokens: int, in_features: int, hidden_features: int, out_features: int) -> bool:
    """Whether the second product of an outer link is one over ``[a | x] [W2 | W3]^T``, or two that accumulate.

    Joining copies both weights and writes x; two products write their sum once more and read it back.
    """
    return tokens * (2 * out_features - in_features) > 2 * out_features * (hidden_features + in_features)


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
