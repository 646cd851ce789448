"""The compiled CPU link on every instruction set of this processor: budget, memory, threads, special values, sizes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recmas_kernels import FusedRecursiveLink, LinkConfig, packed, recursive_link, use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.cpu.module import kernels
from recmas_kernels.reference import LinkArguments
from recmas_kernels.testing import (
    LOW_PRECISION,
    Noise,
    Results,
    check_budget,
    check_link,
    configs,
    eager_twin,
    make_link,
    make_rows,
    name_of,
    relative_error,
    run,
)
from tests.kernels.cpu_settings import AVAILABLE, LAYOUTS, guarded_allocations, instruction_set, laid_out, threads

Judge = Callable[[Results], None]
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(params=AVAILABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("tokens", [1, 7, 129])
def test_error_budget_on_every_instruction_set(isa, tokens, dtype):
    for config in configs().values():
        x = make_rows(tokens, config.in_features, dtype=dtype)
        check_link(make_link(config, dtype), x, make_rows(tokens, config.out_features, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_several_blocks_of_tokens(isa, dtype):
    config = LinkConfig("outer", 11, 23, 17, "linear")
    link = make_link(config, dtype)
    x, dy = make_rows(2500, 11, dtype=dtype), make_rows(2500, 17, dtype=dtype, seed=2)
    check_link(link, x, dy)


@cache
def judged(config: LinkConfig, tokens: int, dtype: torch.dtype) -> tuple[FusedRecursiveLink, Tensor, Tensor, Judge]:
    """A link, its rows, their gradient, and what says whether its results are good: once for all instruction sets."""
    link = make_link(config, dtype)
    x, dy = (make_rows(tokens, size, dtype=dtype, seed=size) for size in (config.in_features, config.out_features))
    return link, x, dy, partial(Noise(link, x, dy, dtype).check, eager=run(eager_twin(link, dtype), x, dy))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize(("hidden", "norm"), [(16, True), (128, False), (256, True), (300, False)])
def test_products_in_bands(isa, hidden, dtype, norm):
    """Many rows go in bands and k in pieces (csrc/cpu/pieces.h): sums of one piece and several, of one term and two."""
    for count, in_features, out_features, tokens in [(1, 300, 256, 288), (3, 256, 300, 600)]:
        config = LinkConfig("outer", in_features, hidden, out_features, "linear", norm=norm)
        link, x, dy, check = judged(config, tokens, dtype)
        with threads(count), guarded_allocations():
            found = run(link, x, dy)
        check(found)


def check_stored_and_packed(config: LinkConfig, tokens: int, dtype: torch.dtype, count: int) -> None:
    """Results and gradients are good, nothing is written outside, and packed weights give the bits of stored ones."""
    link, x, dy, check = judged(config, tokens, dtype)
    with threads(count), guarded_allocations():
        found = run(link, x, dy)
        with torch.no_grad():
            stored = link(x)
            with packed(link):
                assert torch.equal(link(x), stored)
    check(found)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("tokens", [12, 33, 130, 1026])
def test_long_sums(isa, tokens, dtype):
    """A few panels of 2100 k fill the cache of a chunk (csrc/cpu/chunks.h): 300 columns are several chunks. Rows pass a
    panel in 17 pieces (csrc/cpu/whole.h). With AMX a library multiplies 130 and more in fp32 (csrc/cpu/library.h)."""
    check_stored_and_packed(LinkConfig("outer", 2100, 300, 330, "linear"), tokens, dtype, 1)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("sizes", [(300, 400, 64, 410), (1100, 330, 140, 300), (300, 100, 400, 600)])
def test_products_by_a_library(isa, sizes, dtype):
    """With AMX, products of enough rows, columns and k in fp32 (csrc/cpu/library.h), and others that are too small."""
    tokens, *features = sizes
    check_stored_and_packed(LinkConfig("outer", *features, "linear"), tokens, dtype, 3)


def test_a_library_is_found():
    """Where torch multiplies with MKL, which this torch says."""
    assert kernels().multiplies_by_library() == torch.backends.mkl.is_available()


@pytest.mark.parametrize("norm", [True, False])
def test_rows_that_overlap(isa, norm):
    """A library takes no matrix whose rows overlap. Others may be summed in another order: 500 roundings in fp32."""
    link = make_link(LinkConfig("outer", 512, 512, 400, "linear", norm=norm))
    repeated, shifted = make_rows(1, 512).expand(300, 512), make_rows(1, 900)[0].unfold(0, 512, 1)[:300]
    for x in (repeated, shifted):
        dy = make_rows(300, 400, seed=2)
        found, copied = run(link, x, dy), run(link, x.contiguous(), dy)
        for name, grad in copied.grads.items():
            assert relative_error(found.grads[name], grad) < 1e-5, name


def test_a_link_of_half_precision_rounds_weights_at_any_size(isa):
    """Masters in fp32 are rounded to the compute dtype by every product: 70000 is infinite in fp16."""
    link = make_link(LinkConfig("inner", 512, 512, 512, "identity", norm=False))
    with torch.no_grad():
        link.proj1.weight[0, 0] = 70000
        for tokens in (64, 512):
            with torch.autocast("cpu", torch.float16):
                assert torch.isinf(link(torch.ones(tokens, 512))).any(), tokens


@pytest.mark.parametrize("tokens", [3, 5, 17, 33, 49, 65, 130, 1027])
def test_packed_weights_change_no_bit(isa, tokens):
    """Results in fp32 show what rounding to bf16 hides; sizes are no whole number of any kernel's steps."""
    for sizes in ((80, 100, 106), (188, 270, 276), (90, 94, 110)):
        link, x = make_link(LinkConfig("outer", *sizes, "linear"), torch.bfloat16), make_rows(tokens, sizes[0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            stored = link(x)
            assert stored.dtype is torch.float32
            with packed(link):
                assert torch.equal(link(x), stored)


def test_float32_stays_float32_where_torch_rounds_it():
    """A switch that programs set for their GPU; with AMX, torch's products of float32 on a CPU are in bf16 then."""
    code = """
        import torch
        from recmas_kernels import LinkConfig
        from recmas_kernels.testing import eager_twin, make_link, make_rows, relative_error, run
        link, x = make_link(LinkConfig("inner", 1024, 1024, 1024, "identity")), make_rows(128, 1024)
        dy = make_rows(128, 1024, seed=2)
        exact = run(eager_twin(link, torch.float64), x.double(), dy.double())
        torch.set_float32_matmul_precision("medium")
        found = run(link, x, dy)
        assert relative_error(found.y, exact.y) < 1e-5
        assert all(relative_error(grad, exact.grads[name]) < 1e-5 for name, grad in found.grads.items())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_gradients_written_past_the_caches(isa, tokens):
    """That of proj1.weight has 8 MB (csrc/cpu/link_backward.h); 1040 columns are no whole number of panels."""
    link, x, dy, check = judged(LinkConfig("outer", 1040, 2064, 24, "linear"), tokens, torch.float32)
    with threads(2), guarded_allocations():
        found = run(link, x, dy)
    check(found)


@pytest.mark.parametrize("norm", [False, True])
def test_threads_wait_for_each_other_between_blocks(norm):
    """A linear residual reads the rows that the next block of tokens overwrites."""
    config = LinkConfig("outer", 64, 512, 64, "linear", norm=norm)
    link, x = make_link(config), make_rows(4096, 64)
    with threads(2), use_backend("cpu"), torch.no_grad():
        expected = torch.cat([link(rows) for rows in x.split(256)])
        for _ in range(10):
            assert torch.equal(link(x), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_nothing_is_read_before_it_is_written_or_written_outside(isa, tokens, dtype):
    """NaN from an unwritten element would reach a result; guard bands show stray writes."""
    for kind in ("inner", "outer", "no-residual"):
        config = configs()[kind]
        link = make_link(config, dtype)
        x = make_rows(tokens, config.in_features, dtype=dtype).requires_grad_()
        parameters = list(link.parameters())
        with guarded_allocations():
            y = link(x)
            grads = torch.autograd.grad(y.sum(), (x, *parameters))
            with torch.no_grad():
                streamed, packed = link(x), (link(x), link(x))[1]
        for result in (y, streamed, packed, *grads):
            assert torch.isfinite(result).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_same_bits_every_run(isa, dtype, count):
    config = LinkConfig("outer", 96, 130, 96, "linear")
    link = make_link(config, dtype)
    x, dy = make_rows(37, 96, dtype=dtype), make_rows(37, 96, dtype=dtype, seed=2)
    with threads(count):
        first, second = run(link, x, dy), run(link, x, dy)
        assert torch.equal(first.y, second.y)
        for name, grad in first.grads.items():
            assert torch.equal(grad, second.grads[name]), name


SMALL, WIDE = LinkConfig("outer", 96, 130, 96, "linear"), LinkConfig("outer", 130, 270, 300, "linear")


@pytest.mark.parametrize(("config", "tokens"), [(SMALL, 20), (SMALL, 129), (SMALL, 300), (WIDE, 20), (WIDE, 300)])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_same_bits_at_every_thread_count(isa, dtype, config, tokens):
    """Threads take panels, or rows where panels are few, or bands; stored and packed weights alike."""
    link = make_link(config, dtype)
    x, dy = (make_rows(tokens, size, dtype=dtype, seed=size) for size in (config.in_features, config.out_features))
    results, grads = [], []
    for count in (1, 2, 3):
        with threads(count):
            grads.append(run(link, x, dy).grads)
            with torch.no_grad():
                results.append(link(x))
                with packed(link):
                    results.append(link(x))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
        assert torch.equal(grad, grads[2][name]), name


@pytest.mark.parametrize("tokens", [3, 9, 40, 300])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_packing_does_not_change_bits(isa, dtype, config, tokens):
    link = make_link(config, dtype)
    x = make_rows(tokens, config.in_features, dtype=dtype)
    with torch.no_grad():
        stored = link(x)
        with packed(link):
            assert torch.equal(link(x), stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_every_16_bit_value_passes_through(isa, dtype):
    """With zero weights the identity residual returns x: widening and rounding are exact, NaN stays NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 32)
    zero = torch.zeros(32, 32, dtype=dtype)
    ones = torch.ones(32, 32, dtype=dtype)
    x = x.where(torch.isfinite(x), 0)
    kept = torch.ones_like(x, dtype=torch.bool)
    if isa in ("avx512_bf16", "amx") and dtype is torch.bfloat16:  # the hardware's conversion takes subnormals as 0
        kept = x.abs() >= torch.finfo(dtype).tiny
    assert torch.equal(recursive_link(x, zero, zero)[kept], x[kept] + 0)
    assert torch.isnan(recursive_link(torch.full((1, 32), float("nan"), dtype=dtype), ones, ones)).all()


def test_rounding_to_16_bits_is_torchs(isa):
    """fp32 rows with a bf16 or fp16 result: ties, subnormals, overflow to infinity."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (512, 32), dtype=torch.int32, generator=generator).view(torch.float32)
    x = x.where(torch.isfinite(x), 1.0)
    x[:, 16:] = (x[:, 16:] / x[:, 16:].abs()) * torch.exp(8 * torch.randn(512, 16, generator=generator))
    zero = torch.zeros(32, 32)
    for dtype in (torch.bfloat16, torch.float16):
        # z leaves in the compute dtype; with zero weights it is x rounded once.
        tensors = (x, zero, None, zero, None, None, None, None, None, torch.ones(32), None)
        z = cpu.link_fwd_train(LinkArguments(*tensors, "identity", "none", 1e-5, dtype))[2]
        flushed = x.abs() < torch.finfo(torch.float32).tiny  # bf16 hardware takes subnormal fp32 as 0
        assert torch.equal(z[~flushed], x.to(dtype)[~flushed])


def test_nan_and_infinity_stay_in_their_rows(isa):
    link = make_link(configs()["inner"])
    x = make_rows(5, 40)
    with torch.no_grad():
        clean = link(x)
        for bad in (float("nan"), float("inf")):
            spoiled = x.clone()
            spoiled[2, 3] = bad
            y = link(spoiled)
            assert torch.isnan(y[2]).all()
            assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_strides(isa):
    link = make_link(configs()["outer"])
    wide = make_rows(9, 100)
    with torch.no_grad():
        for x in (wide[:, 13:53], wide[::2, :40], wide[:1, :40].expand(6, 40), wide[:, :80:2], wide.t()[:40].t()):
            torch.testing.assert_close(link(x), link(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_masters_in_float32_under_autocast(isa, kind, autocast):
    """The gradients leave in float32 and are as good as the reference's under the same autocast."""
    config = configs()[kind]
    link = make_link(config)
    x, dy = make_rows(33, config.in_features), make_rows(33, config.out_features, seed=2)
    truth = run(eager_twin(link, torch.float64), x.double(), dy.double())
    with torch.autocast("cpu", autocast):
        fused = run(link, x, dy)
        with use_backend("reference"):
            reference = run(link, x, dy)
        with torch.no_grad():
            packed = [link(x) for _ in range(3)][2]
    check_budget("packed y", packed, reference.y, truth.y, autocast)
    check_budget("y", fused.y, reference.y, truth.y, autocast)
    for name, grad in truth.grads.items():
        assert fused.grads[name].dtype is torch.float32
        check_budget(name, fused.grads[name], reference.grads[name], grad, autocast)


SIZES = st.integers(1, 300)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 300),
    in_features=SIZES,
    hidden_features=SIZES,
    out_features=SIZES,
    dtype=st.sampled_from(LOW_PRECISION),
    residual=st.sampled_from(["identity", "linear", "none"]),
    norm=st.booleans(),
    bias=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    isa=st.sampled_from(AVAILABLE or ("baseline",)),
)
def test_any_shape(tokens, in_features, hidden_features, out_features, dtype, residual, norm, bias, layouts, isa):
    if norm:  # over one or two features a norm's gradient is nothing but rounding
        in_features, out_features = in_features + 7, out_features + 7
    out_features = in_features if residual == "identity" else out_features
    config = LinkConfig("outer", in_features, hidden_features, out_features, residual, norm=norm, bias=bias)
    link = make_link(config, dtype)
    x = laid_out(make_rows(tokens, in_features, dtype=dtype), layouts[0])
    dy = laid_out(make_rows(tokens, out_features, dtype=dtype, seed=2), layouts[1])
    with instruction_set(isa), guarded_allocations():
        fused = run(link, x, dy)
    Noise(link, x, dy, dtype).check(fused, run(eager_twin(link, dtype), x, dy))


def test_an_instruction_set_that_is_unknown_or_absent_is_an_error():
    with pytest.raises(ValueError, match="RECMAS_CPU_ISA is 'sse9', expected one of baseline"), instruction_set("sse9"):
        cpu.instruction_set()
    if AVAILABLE != cpu.ISAS:
        with pytest.raises(ValueError, match="the best that this processor"), instruction_set(cpu.ISAS[-1]):
            cpu.instruction_set()


def test_what_is_declined_and_why():
    call = Call("link_fwd", "cpu", torch.float32, 4, 8, 8, 8, training=False)
    assert cpu.declines(call) is None
    assert cpu.declines(call._replace(dtype=torch.float64)) == "the kernels have no float64"
    assert cpu.declines(call._replace(hidden_features=0)) == "a size is 0"
    assert cpu.declines(Call("handoff_fwd", "cpu", torch.float64, 4, 8, 0, 8, training=False)) is None
