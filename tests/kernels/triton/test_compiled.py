"""Every Triton kernel that a real call launches, compiled ahead of time for sm_80 and sm_90, its resources read.

No GPU is needed: a stand-in driver names the target, and the ops run on meta tensors of full size, so what is compiled
is exactly what a device would be given, specialisations included. ``pytest -rP`` prints the resources.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.gpu.candidates import tiles  # noqa: E402
from benchmarks.gpu.candidates.link import NAME, installed  # noqa: E402
from recmas_kernels.backends.triton import alignment, link, plan  # noqa: E402
from recmas_kernels.reference import LinkArguments  # noqa: E402

SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}  # bytes that one program may use: 163, 99 and 227 KB
# Registers per thread. A product may use all 255 of a thread; the passes must leave room for several programs per SM.
REGISTERS = {
    "_normalise": 64,
    "_normalise_backward": 128,
    "_activate": 128,
    "_activate_backward": 168,
    "_align": 80,
    "_scale": 64,
    "_forward": 255,
    "_backward": 255,
    "_product": 255,
    "_persistent_product": 255,
    "_weight_gradients": 255,
}
PRODUCTS = ("_forward", "_backward", "_product", "_weight_gradients")


class Compiled(NamedTuple):
    """A kernel's resources; ``stack`` is bytes per thread, and is not 0 if and only if registers spill.

    ``scratch`` is bytes of global memory that Triton would have to be given an allocator for.
    """

    name: str
    registers: int
    stack: int
    shared: int
    threads: int
    scratch: int
    ptx: str


class StandInDriver:
    """Names a target and nothing else: enough to compile, not to launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # keeps these kernels apart from a real device's in triton's cache

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(name: str, kernel, folder) -> Compiled:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found is not None, report
    registers, stack, local = map(int, found.groups())
    metadata = kernel.metadata
    threads, scratch = 32 * metadata.num_warps, metadata.global_scratch_size
    return Compiled(name, registers, stack + local, metadata.shared, threads, scratch, kernel.asm["ptx"])


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch, tmp_path):
    """``(capability, list)``; the list fills with a `Compiled` for every kernel that a call would have launched."""
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            found[kernel.hash] = resources(self.fn.__name__, kernel, tmp_path)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", StandInDriver(request.param))
    monkeypatch.setattr(plan, "_shared_memory", lambda _: SHARED_MEMORY[request.param])
    monkeypatch.setattr(tiles, "_capability", lambda _: divmod(request.param, 10))
    return request.param, found


def check(compiled, expected: set[str], *, vectors: bool = True, warpgroups: bool = True) -> None:
    """The kernels are the expected ones, within the budgets, and move 16 bytes at a time (``vectors``)."""
    capability, found = compiled
    assert {kernel.name for kernel in found.values()} == expected
    for kernel in found.values():
        print(f"sm_{capability} {kernel[:-1]}")
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes per thread"
        assert kernel.shared <= SHARED_MEMORY[capability], f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.registers <= REGISTERS[kernel.name], f"{kernel.name}: {kernel.registers} registers"
        assert kernel.registers * kernel.threads <= 65536
        assert kernel.scratch == 0, f"{kernel.name} needs an allocator for {kernel.scratch} bytes"
        if kernel.name in PRODUCTS:
            instruction = "wgmma.mma_async" if capability == 90 and warpgroups else "mma"
            assert instruction in kernel.ptx, f"{kernel.name} does not use the tensor cores as it should"
            copies = re.findall(r"cp\.async\.c[ag]\S* \[[^\]]*\], \[[^\]]*\], (\w+)", kernel.ptx)
            # Gains and biases are too few for 16 bytes a thread.
            assert {"0x10"} <= set(copies) <= {"0x8", "0x10"}, f"{kernel.name} copies {set(copies)} bytes at a time"
        elif kernel.name == "_persistent_product":
            assert "wgmma.mma_async" in kernel.ptx
            engine = r"cp\.async\.bulk\.tensor\.2d\."
            assert re.search(engine + r"shared::\w+\.global", kernel.ptx), "no tile is fetched by the copy engine"
            assert re.search(engine + r"global\.shared", kernel.ptx), "no tile is stored by the copy engine"
            assert "cp.async.c" not in kernel.ptx, "some tile is fetched by threads"
        elif vectors:
            assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx), f"{kernel.name} does not load 16 bytes at a time"
            assert re.search(r"st\.global\S*\.v4\.b32", kernel.ptx), f"{kernel.name} does not store 16 bytes at a time"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def call_link(monkeypatch, variant, *sizes, **options):
    """Forward for training and backward with every gradient."""
    with installed(), monkeypatch.context() as patch:
        patch.setattr(plan, "variant", lambda *_: variant)
        _call_link(*sizes, **options)


def _call_link(tokens, in_features, hidden, out_features, residual, *, norm, dtype=torch.bfloat16):
    def vector(size):
        return meta(size, dtype=dtype)

    linear = residual == "linear"
    x, w3 = meta(tokens, in_features, dtype=dtype), meta(out_features, in_features, dtype=dtype) if linear else None
    w1, w2 = meta(hidden, in_features, dtype=dtype), meta(out_features, hidden, dtype=dtype)
    norms = [vector(in_features)] * 2 + [vector(out_features)] * 2 if norm else [None] * 4
    weights = (w1, vector(hidden), w2, vector(out_features), w3, vector(out_features) if linear else None, *norms)
    arguments = LinkArguments(x, *weights, residual, "none", 1e-5, dtype)
    y, pre, z, stats = link.link_fwd_train(arguments)
    link.link_bwd(arguments, torch.empty_like(y), pre, z, stats, [True] * 11)


PASSES = {"_normalise", "_normalise_backward"}
GELU = {"_activate", "_activate_backward"}


@pytest.mark.parametrize("width", [2048, 8192])
def test_library_variant(compiled, monkeypatch, width):
    call_link(monkeypatch, plan.LIBRARY, 16384, width, width, width, "identity", norm=True)
    check(compiled, PASSES | GELU)


@pytest.mark.parametrize(("width", "hidden"), [(2048, 256), (2048, 512), (1040, 208)])
def test_small_variant(compiled, monkeypatch, width, hidden):
    call_link(monkeypatch, plan.SMALL, 16384, width, hidden, width, "identity", norm=True)
    # A hidden tile of 512 leaves room for 32 tokens in the forward, half a warpgroup's tile.
    check(compiled, {"_forward", "_backward", "_normalise_backward"}, warpgroups=hidden < 512)


@pytest.fixture
def by_pointers(monkeypatch):
    choose = tiles.choose
    monkeypatch.setattr(tiles, "choose", lambda *given, described, **how: choose(*given, described=False, **how))


def test_candidates_of_an_outer_link(compiled, monkeypatch, by_pointers):
    call_link(monkeypatch, NAME, 16384, 2048, 3072, 1536, "linear", norm=True)
    check(compiled, PASSES | {"_product", "_weight_gradients"})


def test_candidates_of_an_inner_link(compiled, monkeypatch, by_pointers):
    call_link(monkeypatch, NAME, 1536, 2048, 2048, 2048, "identity", norm=False)
    check(compiled, {"_product", "_weight_gradients"})


@pytest.mark.parametrize("compiled", [90], ids=["sm_90"], indirect=True)
@pytest.mark.parametrize("config", tiles.persistent_configs(), ids=lambda config: "x".join(map(str, config[:5])))
def test_candidates_by_tensor_descriptors(compiled, monkeypatch, config):
    """Every tile on every product of an outer link, one on those of an inner link."""
    choose = tiles.choose

    def by_descriptors(*given, described, **how):
        return config if described else choose(*given, described=False, **how)

    monkeypatch.setattr(tiles, "choose", by_descriptors)
    call_link(monkeypatch, NAME, 16384, 2048, 3072, 1536, "linear", norm=False)
    if config == tiles.persistent_configs()[0]:
        call_link(monkeypatch, NAME, 1536, 2048, 2048, 2048, "identity", norm=False)
    check(compiled, {"_persistent_product", "_weight_gradients"})


def test_default_variant_at_sizes_that_divide_nothing(compiled, monkeypatch):
    sizes = (47, 1543, 203, 1543, "identity")
    default = plan.candidates(plan.Link(torch.device("meta"), torch.bfloat16, *sizes))[0]
    call_link(monkeypatch, default, *sizes, norm=True)
    check(compiled, PASSES | GELU, vectors=False)


@pytest.mark.parametrize("compiled", [90], ids=["sm_90"], indirect=True)
@pytest.mark.parametrize("variant", [plan.LIBRARY, plan.SMALL, NAME])
def test_sizes_of_one_compile(compiled, monkeypatch, variant):
    """A launch turns every size and stride of 1 into a constant; the code must still have one type on every path."""
    sizes = [(1, 1, 1, 1, "identity"), (16, 16, 1, 16, "identity"), (1, 17, 1, 1, "linear"), (2, 16, 16, 1, "linear")]
    for tokens, in_features, hidden, out_features, residual in sizes:
        if variant != plan.SMALL or residual != "linear":
            call_link(monkeypatch, variant, tokens, in_features, hidden, out_features, residual, norm=True)
    one, ids = meta(1, 1), meta(1, dtype=torch.int64)
    alignment.alignment_fwd(one, one, ids, meta(1, dtype=torch.bool), 1.0, 0.1, 1.0)
    alignment.alignment_bwd(one, torch.empty((), device="meta"))
    _, found = compiled
    assert {"_align", "_scale"} < {kernel.name for kernel in found.values()}


@pytest.mark.parametrize("compiled", [86], ids=["sm_86"], indirect=True)
@pytest.mark.parametrize(("variant", "hidden"), [(plan.SMALL, 256), (plan.SMALL, 512), (NAME, 3072)])
def test_the_smaller_tiles_fit_into_99_kilobytes(compiled, monkeypatch, variant, hidden):
    call_link(monkeypatch, variant, 16384, 2048, hidden, 2048, "identity", norm=True)
    _, found = compiled
    assert found
    for kernel in found.values():
        assert kernel.shared <= SHARED_MEMORY[86], f"{kernel.name}: {kernel.shared} bytes of shared memory"
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes per thread"


def test_row_ops(compiled):
    rows, ids = meta(16384, 2048), meta(16384, dtype=torch.int64)
    alignment.alignment_fwd(rows, meta(151936, 2048), ids, meta(16384, dtype=torch.bool), 1.0, 0.1, 1.0)
    alignment.alignment_fwd(meta(64, 8192), meta(64, 8192), None, None, 1.0, 0.0, 1.0)
    alignment.alignment_bwd(rows, torch.empty((), device="meta"))
    check(compiled, {"_align", "_scale"})


def test_one_compile_for_all_numbers_of_tokens(compiled, monkeypatch):
    """Rows of statistics lie wherever the number of tokens puts them; no kernel is built for where that is."""
    for tokens in (1024, 1025, 1026, 1027):
        call_link(monkeypatch, plan.LIBRARY, tokens, 256, 256, 256, "identity", norm=True)
    _, found = compiled
    names = [kernel.name for kernel in found.values()]
    assert sorted(names) == sorted(["_normalise", "_normalise", "_normalise_backward", "_normalise_backward", *GELU])
