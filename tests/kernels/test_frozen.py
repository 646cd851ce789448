"""Products of frozen weights: results, gradients, the bits of the weight, modes of torch, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recmas_kernels import FrozenLinear, use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.frozen import frozen_linear, pack
from recmas_kernels.testing import LOW_PRECISION, make_rows
from tests.kernels.cpu_settings import AVAILABLE, guarded_allocations, instruction_set, threads
from tests.kernels.frozen import budget, error, make_linear

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
SIZES = [(37, 53), (96, 17), (64, 200), (16, 60), (1, 1)]


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_match_float64(isa: str, dtype: torch.dtype, sizes: tuple[int, int]):
    linear = make_linear(*sizes, dtype=dtype)
    exact_weight, exact_bias = linear.weight.double(), linear.bias.double()
    with instruction_set(isa), guarded_allocations():
        frozen = FrozenLinear.from_linear(linear)
        for tokens in (1, 2, 5, 9, 130):
            x = make_rows(tokens, sizes[0], dtype=dtype).requires_grad_()
            y = frozen(x)
            dy = make_rows(tokens, sizes[1], dtype=dtype, seed=2)
            (dx,) = torch.autograd.grad(y, x, dy)
            exact = F.linear(x.detach().double(), exact_weight, exact_bias)
            assert y.dtype is dtype
            assert error(y.detach(), exact) <= budget(dtype, sizes[0])
            assert error(dx, dy.double() @ exact_weight) <= budget(dtype, sizes[1])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_float32_weight_of_16_bit_values_is_kept_in_16_bits(stored: torch.dtype):
    linear = make_linear(96, 50)
    linear.weight.data = linear.weight.data.to(stored).float()
    panels = pack(linear.weight)
    assert panels.stored is stored
    assert torch.equal(panels.weight(), linear.weight)
    x = make_rows(3, 96)
    assert error(frozen_linear(x, panels), F.linear(x.double(), linear.weight.double())) <= budget(torch.float32, 96)
    linear.weight.data[3, 5] = 1 + 2**-20
    assert pack(linear.weight).stored is torch.float32


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("low", [0, 7])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_every_bit_comes_back(isa: str, dtype: torch.dtype, low: int, flushing: bool):
    """NaN of every kind, denormal numbers on a processor set to take them for zero, and negative zero among them."""
    bits = torch.arange(2**16, dtype=torch.int32).view(256, 256)
    weight = bits.to(torch.int16).view(dtype) if dtype.itemsize == 2 else (bits * 65536 + low).view(dtype)
    if dtype is torch.float16:
        with pytest.raises(ValueError, match="it holds NaN"):
            pack(weight)
        weight = torch.where(weight.isnan(), 1.0, weight)
    narrows = dtype is torch.float32 and low == 0
    if narrows:
        weight = torch.where(weight.isfinite(), weight, 1.0)
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    torch.set_flush_denormal(flushing)
    try:
        with instruction_set(isa):
            panels = pack(weight)
            back = panels.weight()
    finally:
        torch.set_flush_denormal(False)
    assert panels.stored is (torch.bfloat16 if narrows else dtype)
    assert torch.equal(back.view(kind), weight.view(kind))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_kept_in_bfloat16(value: float):
    """Rows may be split, and a part that is 0 times infinity is NaN."""
    weight = make_linear(96, 50).weight.bfloat16().float()
    weight[3, 5] = value
    panels = pack(weight)
    assert panels.stored is not torch.bfloat16
    assert torch.equal(panels.weight().view(torch.int32), weight.view(torch.int32))
    x = torch.ones(20, 96)
    torch.testing.assert_close(frozen_linear(x, panels), F.linear(x, weight), equal_nan=True)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_no_bit_of_float32_rows_is_lost(isa: str):
    """Whole numbers of 22 bits times weights of 16 bits: every product and sum is exact, so the result is, too."""
    torch.manual_seed(0)
    weight = torch.zeros(70, 100)
    for row in weight:
        row[torch.randperm(100)[:2]] = torch.tensor([1.0, -1.0])
    with instruction_set(isa), guarded_allocations():
        panels = pack(weight)
        assert panels.stored is torch.bfloat16
        for tokens in (1, 3, 17, 40):
            x = torch.randint(-(2**22), 2**22, (tokens, 100)).float().requires_grad_()
            y = frozen_linear(x, panels)
            assert torch.equal(y, F.linear(x.double(), weight.double()).float())
            dy = torch.randint(-(2**20), 2**20, (tokens, 70)).float()
            (dx,) = torch.autograd.grad(y, x, dy)
            assert torch.equal(dx, (dy.double() @ weight.double()).float())


@pytest.mark.parametrize("isa", AVAILABLE)
def test_rows_that_are_not_finite_and_the_largest_ones(isa: str):
    weight = make_linear(100, 70).weight.bfloat16().float()
    largest = torch.finfo(torch.float32).max
    low_payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32).item()
    with instruction_set(isa):
        panels = pack(weight)
        for value in (torch.inf, -torch.inf, torch.nan, low_payload, largest, -largest):
            x = make_rows(20, 100)
            x[2, 7] = value
            x[5, 99] = value
            y = frozen_linear(x, panels)
            exact = F.linear(x.double(), weight.double())
            for result, wanted in zip(y, exact, strict=True):
                if wanted.isfinite().all():
                    assert error(result, wanted) <= budget(torch.float32, 100)
                else:
                    assert torch.equal(result.isnan(), wanted.isnan())
                    assert torch.equal(result.isposinf(), wanted.isposinf())
                    assert torch.equal(result.isneginf(), wanted.isneginf())


@pytest.mark.parametrize("isa", AVAILABLE)
def test_rows_of_any_size_keep_their_bits(isa: str):
    """A power of two scales the result exactly, as long as no part of a row is denormal."""
    weight = make_linear(100, 70).weight.bfloat16().float()
    x = make_rows(20, 100)
    with instruction_set(isa):
        panels = pack(weight)
        y = frozen_linear(x, panels)
        for scale in (2.0**-60, 2.0**100):
            assert torch.equal(frozen_linear(x * scale, panels), y * scale)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_a_last_block_of_one_row(isa: str):
    weight = make_linear(40, 60).weight.bfloat16().float()
    x = make_rows(1025, 40)
    with instruction_set(isa), guarded_allocations():
        y = frozen_linear(x, pack(weight))
    assert error(y, F.linear(x.double(), weight.double())) <= budget(torch.float32, 40)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_take_several_passes(isa: str, dtype: torch.dtype):
    """With AMX features pass by shares of 12 KB; the last block is one row."""
    linear = make_linear(6200, 60, dtype=torch.bfloat16).to(dtype)
    exact_weight, exact_bias = linear.weight.double(), linear.bias.double()
    with instruction_set(isa), guarded_allocations():
        frozen = FrozenLinear.from_linear(linear)
        for tokens in (33, 1025):
            x = make_rows(tokens, 6200, dtype=dtype)
            assert error(frozen(x), F.linear(x.double(), exact_weight, exact_bias)) <= budget(dtype, 6200)


def test_float16_is_chosen_by_bits():
    """Denormal float16 values are kept, NaN is not narrowed."""
    weight = torch.arange(1, 2049, dtype=torch.float32).view(32, 64) * 2.0**-24
    assert pack(weight).stored is torch.float16
    assert torch.equal(pack(weight).weight(), weight)
    weight[0, 0] = torch.nan
    assert pack(weight).stored is torch.float32


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("stored", LOW_PRECISION)
def test_many_rows_in_bands(isa: str, stored: torch.dtype):
    """Blocks of rows and pieces of the sum, each with a rest; of rows also a single one."""
    weight = make_linear(300, 1930).weight.to(stored).float()
    with instruction_set(isa), guarded_allocations():
        panels = pack(weight)
        assert panels.stored is stored
        for tokens in (23, 24, 47, 48, 513, 520):
            x = make_rows(tokens, 300).requires_grad_()
            y = frozen_linear(x, panels)
            dy = make_rows(tokens, 1930, seed=2)
            assert error(y.detach(), F.linear(x.detach().double(), weight.double())) <= budget(torch.float32, 300)
            (dx,) = torch.autograd.grad(y, x, dy)
            assert error(dx, dy.double() @ weight.double()) <= budget(torch.float32, 1930)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_a_shallow_rest_of_the_weight_takes_no_more_memory(isa: str):
    """Out features are laid out 1920 at a time (csrc/cpu/frozen.h); of the 1442 left a chunk has more panels."""
    linear = make_linear(192, 1920 + 1442, dtype=torch.bfloat16)
    dy = make_rows(40, 1920 + 1442, dtype=torch.bfloat16)
    with instruction_set(isa), threads(1), guarded_allocations():
        frozen = FrozenLinear.from_linear(linear)
        x = make_rows(40, 192, dtype=torch.bfloat16).requires_grad_()
        (dx,) = torch.autograd.grad(frozen(x), x, dy)
    assert error(dx, dy.double() @ linear.weight.double()) <= budget(torch.bfloat16, 1920 + 1442)


def test_panels_made_in_inference_mode_serve_gradients():
    linear = make_linear()
    with torch.inference_mode():
        panels = pack(linear.weight)
    x = make_rows(3, 37).requires_grad_()
    (dx,) = torch.autograd.grad(frozen_linear(x, panels).sum(), x)
    torch.testing.assert_close(dx, linear.weight.sum(dim=0).expand_as(dx))


def test_threads_change_no_bit():
    frozen = FrozenLinear.from_linear(make_linear(512, 300))
    for tokens in (1, 4, 40):
        x = make_rows(tokens, 512).requires_grad_()
        found = []
        for count in (1, 3):
            with threads(count):
                y = frozen(x)
                found.append((y, *torch.autograd.grad(y.sum(), x)))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_of_any_shape_and_stride():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    rows = make_rows(2, 3, 2 * 37)
    for x in (rows[0, 0, :37], rows[:, :, :37], rows[0, :, :37], rows[..., ::2], rows[:0, :, :37], rows[:1, 1:2, 37:]):
        y = frozen(x)
        torch.testing.assert_close(y, linear(x))
        assert y.shape == linear(x).shape
        assert y.is_contiguous()


def test_transforms_and_second_derivatives():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(4, 37)
    torch.testing.assert_close(torch.func.vmap(frozen)(x), linear(x))
    torch.testing.assert_close(torch.func.jacrev(frozen)(x[0]), linear.weight)
    tangent = make_rows(4, 37, seed=3)
    torch.testing.assert_close(torch.func.jvp(frozen, (x,), (tangent,))[1], tangent @ linear.weight.T)
    x.requires_grad_()
    (first,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0])


def test_ops_pass_opcheck():
    panels = pack(make_linear().weight)
    x = make_rows(3, 37).requires_grad_()
    torch.library.opcheck(torch.ops.recmas.frozen_linear.default, (x, panels.data, None, 53, torch.float32))
    dy = make_rows(3, 53).requires_grad_()
    torch.library.opcheck(torch.ops.recmas.frozen_linear_bwd.default, (dy, panels.data, 37, torch.float32))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_autocast_gives_autocasts_dtype(stored: torch.dtype):
    linear = make_linear()
    linear.weight.data = linear.weight.data.to(stored).float()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(5, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = frozen(x), linear(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert error(y, linear.double()(x.double())) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_other_16_bits_is_that_of_plain_torch(dtype: torch.dtype):
    """Which rounds the weight: what the other dtype cannot hold is an infinity there."""
    linear = make_linear(dtype=dtype)
    linear.weight.data[3, 5] = torch.finfo(dtype).max
    frozen = FrozenLinear.from_linear(linear)
    x = torch.ones(20, 37, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.float16 if dtype is torch.bfloat16 else torch.bfloat16):
        torch.testing.assert_close(frozen(x), linear(x), rtol=0, atol=0)


def test_plain_torch_on_request():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(3, 37)
    with use_backend("reference"):
        assert torch.equal(frozen(x), linear(x))


def test_what_does_not_fit_is_one_line():
    frozen = FrozenLinear.from_linear(make_linear())
    for x, kind, message in [
        (make_rows(2, 36), ValueError, r"x has shape \(2, 36\), expected \[\.\.\., 37\]"),
        (make_rows(2, 37, dtype=torch.bfloat16), ValueError, "x has dtype torch.bfloat16 and the frozen weight has"),
        (torch.zeros(2, 37, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        ([1.0], TypeError, "x is a list"),
        (torch.tensor(1.0), ValueError, "x has no dimension"),
        (torch.zeros(2, 37, device="meta"), ValueError, "x is on meta"),
    ]:
        with pytest.raises(kind, match=message):
            frozen(x)
    with pytest.raises(ValueError, match="it learns"):
        FrozenLinear.from_linear(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"it is a .*Bilinear"):
        FrozenLinear.from_linear(nn.Bilinear(3, 3, 3))
    with pytest.raises(ValueError, match="the kernels have no float64"):
        pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="panels has another shape"):
        torch.ops.recmas.frozen_linear(make_rows(1, 37), frozen.panels.data[:-1], None, 53, torch.float32)
