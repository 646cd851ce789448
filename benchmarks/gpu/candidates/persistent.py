"""The product of `matmul` for Hopper: a program per SM walks over tiles that the copy engine fetches and stores.

Tensor descriptors are made on the host, at launch, and travel as kernel arguments: no scratch memory, hence no
allocator of Triton's to set (its setting is per thread, and backward passes run on threads of autograd's own), and a
CUDA graph records them by value. The engine wants rows of whole 16 bytes; what lies outside a tensor it reads as zero
and does not write, so no tile needs a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu.candidates import tiles
from benchmarks.gpu.candidates.epilogue import SLOPE, finish, place
from benchmarks.gpu.candidates.product import Product
from recmas_kernels.backends.triton.device import TRITON_DTYPES


@triton.jit
def _accumulate(total, left, right, first_row, first_column, depth, TURNED: tl.constexpr, DEPTH: tl.constexpr):
    """``total + left right`` over the whole depth; a TURNED right is stored ``[columns, depth]``."""
    for start in range(0, depth, DEPTH):
        a = left.load([first_row, start])
        b = right.load([first_column, start]).T if TURNED else right.load([start, first_column])
        total = tl.dot(a, b, total)
    return total


@triton.jit(do_not_specialize=["rows"])
def _persistent_product(
    left,  # descriptor of [rows, depth]
    right,  # descriptor of [columns, depth] if TURNED, else of [depth, columns]
    more_left,  # a second pair of another depth, or None
    more_right,
    bias,  # [columns] or None
    more_bias,  # [columns] or None
    addend,  # this and the next three: descriptors of [rows, columns], or None; see `epilogue.finish`
    pre,
    act,
    out,
    partials,  # float32 [row tiles, columns] or None
    rows,
    columns,
    depth,
    more_depth,
    MODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    TURNED: tl.constexpr,
    FLATTEN: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = place(tile, row_tiles, column_tiles)
        first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        total = _accumulate(total, left, right, first_row, first_column, depth, TURNED, DEPTH)
        if more_left is not None:
            total = _accumulate(total, more_left, more_right, first_row, first_column, more_depth, TURNED, DEPTH)
        finish(
            total, bias, more_bias, addend, pre, act, out, partials, row_tile, column_tile, rows, columns, 0,
            MODE, COMPUTE, TANH, WHOLE_COLUMNS, True,
        )  # fmt: skip


def _tiled(product: Product) -> dict[str, Tensor | None]:
    """The tensors that the copy engine moves, as they lie in memory."""
    right, more_right = product.right, product.more_right
    if product.turned:
        right, more_right = right.t(), None if more_right is None else more_right.t()
    return {
        "left": product.left,
        "right": right,
        "more_left": product.more_left,
        "more_right": more_right,
        "addend": product.addend,
        "pre": product.pre,
        "act": product.act,
        "out": product.out,
    }


def refusal(product: Product) -> str | None:
    """Why the copy engine cannot move the product's tiles; None if it can."""
    reason = tiles.no_copy_engine(product.out.device, product.left.dtype)
    if reason is not None:
        return reason
    for name, tensor in _tiled(product).items():
        if tensor is None:
            continue
        # Rows may lie apart, but not on top of each other, as those of an expanded tensor do.
        apart, width = tensor.stride(0), tensor.shape[1]
        if tensor.stride(1) != 1 or apart < width or not tiles.even(apart, tensor.dtype):
            return f"{name} has rows {apart * tensor.element_size()} bytes apart, not a multiple of {tiles.EVEN_BYTES}"
        if tensor.data_ptr() % tiles.EVEN_BYTES:
            return f"{name} does not begin at a multiple of {tiles.EVEN_BYTES} bytes"
    return None


def launch(product: Product, config: tiles.MatmulConfig) -> Tensor | None:
    """As `product.launch`, for a product that is not refused."""
    rows, columns = product.out.shape
    tile, piece = [config.rows, config.depth], [config.rows, config.columns // 4]
    blocks = dict.fromkeys(("left", "more_left"), tile) | dict.fromkeys(("addend", "pre", "act", "out"), piece)
    across = [config.columns, config.depth] if product.turned else [config.depth, config.columns]
    blocks |= dict.fromkeys(("right", "more_right"), across)
    described = {
        name: None if tensor is None else TensorDescriptor.from_tensor(tensor, blocks[name])
        for name, tensor in _tiled(product).items()
    }
    partials = product.partials(config)
    programs = min(tiles.tiles(rows, columns, config), tiles.multiprocessors(product.out.device))
    _persistent_product[(programs,)](
        described["left"],
        described["right"],
        described["more_left"],
        described["more_right"],
        product.bias,
        product.more_bias,
        described["addend"],
        described["pre"],
        described["act"],
        described["out"],
        partials,
        rows,
        columns,
        product.left.shape[1],
        product.more_depth,
        MODE=product.mode,
        COMPUTE=TRITON_DTYPES[product.left.dtype],
        TANH=product.tanh,
        TURNED=product.turned,
        # Flattened, the next tile is fetched while this one is finished. GELU's derivative spills beside that
        # (72 bytes per thread under Triton 3.6), and two depths are two loops, which are not flattened.
        FLATTEN=product.mode != SLOPE.value and product.more_left is None,
        WHOLE_COLUMNS=columns % config.columns == 0,
        **config.options(),
    )
    return None if partials is None else partials.sum(0)
