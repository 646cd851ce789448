"""The few-token CUDA link: which calls it takes, its errors, what nvcc made of it, and on a device its numbers.

Its arithmetic and indexing are tested without a device by ``csrc/tests/test_cuda.cpp`` (``make native``).
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recmas_kernels import LinkConfig, sources, use_backend
from recmas_kernels.backends import choice, cuda
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.explain import explain_call
from recmas_kernels.testing import (
    LOW_PRECISION,
    check_budget,
    check_link,
    configs,
    eager_twin,
    make_link,
    make_rows,
    name_of,
    poisoned_allocations,
)

CALL = Call("link_fwd", "cuda", torch.bfloat16, 4, 2048, 2048, 2048, training=False)
CONFIGS = {
    **configs(),
    "released": LinkConfig("inner", 1024, 1024, 1024, "identity"),
    "deep": LinkConfig("outer", 4104, 520, 264, "linear"),  # more steps than the ring has stages
    "odd rows": LinkConfig("outer", 120, 304, 77, "linear"),
}
TOKENS = (1, 7, 8, 9, 16, 17, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"tokens": 0}, None),
        ({"tokens": cuda.MOST_TOKENS}, None),
        ({"op": "link_fwd_train", "training": True}, None),
        ({"in_features": 8, "hidden_features": 16, "out_features": 99999}, None),
        ({"in_features": 4, "dtype": torch.float32}, None),
        ({"in_features": 4}, "rows of 4 in features are no multiple of 16 bytes"),
        ({"hidden_features": 2050}, "rows of 2050 hidden features are no multiple of 16 bytes"),
        ({"tokens": cuda.MOST_TOKENS + 1}, "33 tokens: its link kernels stream the weights past 32 at most"),
        ({"dtype": torch.float64}, "the kernels have no float64"),
        ({"hidden_features": 0}, "a size is 0"),
        ({"op": "link_bwd"}, "the CUDA module has no link_bwd"),
        ({"op": "alignment_fwd"}, "the CUDA module has no alignment_fwd"),
    ],
)
def test_declines_name_the_reason(change, reason):
    found = cuda.declines(CALL._replace(**change))
    assert found is None if reason is None else reason in found


def test_explain_tells_device_driver_and_alignment(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "_native", lambda: SimpleNamespace(driver_version=lambda: 13010))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "cuda: serves this call (bfloat16 on sm_90, driver for CUDA 13.1)" in explain_call(CALL)
    handoff = CALL._replace(op="handoff_fwd", hidden_features=0)
    assert "cuda: serves this call (by torch's own copies of rows)" in explain_call(handoff)


SHIPPED = ["80-real", "90-real", "90-virtual", "100-real", "120-real"]


@pytest.mark.parametrize(
    ("capability", "architectures", "driver", "reason"),
    [
        ((8, 0), SHIPPED, 13000, None),
        ((8, 9), SHIPPED, 13000, None),
        ((9, 0), SHIPPED, 13000, None),
        ((10, 3), SHIPPED, 13000, None),
        ((12, 1), SHIPPED, 13000, None),
        ((11, 0), SHIPPED, 13010, None),  # translated
        ((11, 0), SHIPPED, 13000, "the driver, for CUDA 13.0, reads no PTX of CUDA 13.1"),
        ((7, 5), SHIPPED, 13010, "holds code for 80-real, 90-real, 90-virtual, 100-real, 120-real alone"),
        ((9, 0), ["90a-real"], 13010, None),
        ((10, 0), ["90a-real", "90a-virtual"], 13010, "holds code for"),
        ((10, 0), ["90"], 13010, None),
        ((10, 0), ["90"], 13000, "reads no PTX"),
        ((8, 0), ["86-real"], 13010, "holds code for 86-real alone"),
    ],
    ids=str,
)
def test_code_or_ptx_that_the_driver_reads(capability, architectures, driver, reason):
    found = cuda.code_missing(capability, architectures, driver, 13010)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("word", "meant", "found"),
    [
        ("native", "90-real", ["90-real"]),
        ("all-major", "80-real;90", ["80-real", "90"]),
        ("80-real;90", "", ["80-real", "90"]),
        ("native", "No CUDA devices found.-real", None),
    ],
)
def test_the_module_names_in_numbers_what_it_holds_code_for(tmp_path, word, meant, found):
    """CMake leaves its words in the list, "native" among them, with which `make gpu` builds."""
    cmake = pytest.importorskip("cmake")
    script = tmp_path / "script.cmake"
    part = Path(__file__).parents[2] / "csrc" / "cuda" / "architectures.cmake"
    script.write_text(f'include("{part}")\nmessage("${{CMAKE_CUDA_ARCHITECTURES}}")\n')
    command = [f"{cmake.CMAKE_BIN_DIR}/cmake", f"-DCMAKE_CUDA_ARCHITECTURES={word}"]
    if meant:
        command.append(f"-DCMAKE_CUDA_ARCHITECTURES_{word.upper().replace('-', '_')}={meant}")
    done = subprocess.run([*command, "-P", script], capture_output=True, text=True)
    if found is None:
        assert done.returncode != 0
        assert f"CUDA architectures {word}: {meant}" in done.stderr
    else:
        assert done.stderr.strip().split(";") == found
        assert cuda.code_missing((9, 0), found, 13000, 13000) is None


@pytest.mark.parametrize(
    ("driver", "capability", "reason"),
    [
        (13000, (9, 0), None),
        (12090, (9, 0), "the driver serves CUDA 12.9, the module was built with CUDA 13.1"),
        (13000, (11, 0), "cuda:0 has compute capability 11.0: its code would have to be translated"),
    ],
)
def test_a_driver_that_is_too_old_is_a_reason_before_any_call(monkeypatch, driver, capability, reason):
    module = SimpleNamespace(driver_version=lambda: driver, toolkit_version=13010, architectures=",".join(SHIPPED))
    monkeypatch.setattr(cuda, "_native", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = cuda.unavailable.__wrapped__()
    assert found is None if reason is None else found.startswith(reason)


@pytest.fixture
def native():
    """The compiled module, of these sources; tests that need it are counted as skipped where it was not built."""
    reason = "recmas_kernels._cuda is not built"
    module = pytest.importorskip("recmas_kernels._cuda", reason=reason, exc_type=ImportError)
    assert sources.digest("cuda") in (None, module.sources), "recmas_kernels._cuda was built from other sources"
    return module


def test_a_module_that_was_built_loads_without_a_device():
    folder = Path(cuda.__file__).parents[1]
    if not (folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        pytest.skip("recmas_kernels._cuda is not built")
    importlib.import_module("recmas_kernels._cuda")


def test_the_module_agrees_on_the_most_tokens(native):
    assert native.most_link_tokens == cuda.MOST_TOKENS


def test_the_workspace_holds_the_rows_between_the_kernels(native):
    rows = 7 * 2048 * 2
    assert native.link_forward_workspace((7, 2048, 2048, 2048), 1, False, False) == 2 * rows  # x's copy, activations
    assert native.link_forward_workspace((7, 2048, 2048, 2048), 1, True, True) == 3 * rows + 7 * 2048 * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device the call succeeds")
def test_without_a_device_a_call_names_op_shape_device_and_error(native):
    absent, workspace = [(0, 0)] * 7, native.link_forward_workspace((2, 8, 16, 8), 1, False, False)
    arguments = ((2, 8, 16, 8), 1, 0, 0, 1e-5, 64, 8, 1, (64, 64, 0), absent, (64, 0, 0, 0), 64, workspace, 0, 0)
    with pytest.raises(RuntimeError, match=r"link_forward 2 x 8 -> 16 -> 8 on cuda:0: CUDA error \d+ \(cudaError\w+\)"):
        native.link_forward(*arguments)


def test_a_call_that_makes_no_sense_is_refused(native):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        native.link_forward(
            (33, 8, 16, 8), 1, 0, 0, 1e-5, 64, 8, 1, (64, 64, 0), [(0, 0)] * 7, (64, 0, 0, 0), 64, 2**20, 0, 0
        )


# Registers that a thread may use: 128 let two blocks, of two kernels, share a processor.
REGISTERS = {"link_product": 128, "link_rows": 80}


def test_nothing_spills(native):
    """The kernels in the module, for each chip that it holds code for; ``pytest -rP`` prints their registers."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = triton.knobs.nvidia.cuobjdump.path
    page = subprocess.run([tool, "-res-usage", native.__file__], capture_output=True, text=True, check=True).stdout
    chips = re.split(r"Fatbin elf code:\n=+\narch = sm_(\d+)\n", page)[1:]
    shipped = [name.partition("-")[0] for name in native.architectures.split(",") if not name.endswith("-virtual")]
    assert sorted(chips[::2]) == sorted(shipped)
    for chip, usage in zip(chips[::2], chips[1::2], strict=True):
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        found = set()
        for name, registers, stack, local in kernels:
            kernel = next(known for known in REGISTERS if known in name)
            found.add(kernel)
            print(f"sm_{chip} {name}: {registers} registers")
            assert (stack, local) == ("0", "0"), f"sm_{chip} {name} spills"  # what is spilled lies on the stack
            assert int(registers) <= REGISTERS[kernel], f"sm_{chip} {name}: {registers} registers"
        assert found == set(REGISTERS)
        assert len(kernels) == 9 + 18, "a product per dtype and token group; rows per dtype of what they read and write"


@pytest.fixture
def serving():
    """Skips unless the CUDA backend can serve, and forces it; everything made without a device lands on the GPU."""
    reason = cuda.unavailable()
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    with use_backend("cuda"):
        yield


def check_inference(link, x):
    """The fused output of device tensors, held to the budget; float64 and eager run on the CPU."""
    dtype, on_cpu = x.dtype, x.cpu()
    with torch.no_grad(), torch.device("cuda"), poisoned_allocations():
        fused = link(x)
    with torch.no_grad():
        host = link.cpu()
        truth, eager = eager_twin(host, torch.float64)(on_cpu.double()), eager_twin(host, dtype)(on_cpu)
        link.cuda()
    check_budget("y", fused.cpu(), eager, truth, dtype)
    return fused


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_stay_in_the_error_budget(serving, kind, dtype, tokens):
    link = make_link(CONFIGS[kind], dtype).cuda()
    x = make_rows(tokens, link.config.in_features, dtype=dtype).cuda()
    first = check_inference(link, x)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(link(x), first), "same inputs, other bits"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("kind", ["inner", "outer", "no-residual", "tanh", "released"])
def test_what_it_saves_serves_the_backward(serving, kind, dtype):
    link = make_link(CONFIGS[kind], dtype).cuda()
    x = make_rows(7, link.config.in_features, dtype=dtype).cuda()
    dy = make_rows(7, link.config.out_features, dtype=dtype, seed=2).cuda()
    with use_backend("auto"), torch.device("cuda"):  # the backward is another backend's
        check_link(link, x, dy)


@pytest.mark.gpu
def test_rows_and_weights_off_alignment(serving):
    """Strided, offset and expanded rows; weights that begin two bytes past an aligned address."""
    link = make_link(LinkConfig("outer", 64, 128, 40, "linear"), torch.bfloat16).cuda()
    wide = make_rows(9, 200, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        for x in (wide[:, 64:128], wide[:, 3:67], wide[::2, 1:65], wide[:1, :64].expand(5, 64)):
            assert torch.equal(link(x), link(x.contiguous()))
        x = wide[:, :64].contiguous()
        expected = link(x)
        for parameter in (link.proj1.weight, link.proj2.weight, link.residual_proj.weight):
            shifted = torch.empty(parameter.numel() + 1, dtype=parameter.dtype, device="cuda")[1:]
            parameter.data = shifted.view_as(parameter).copy_(parameter)
        torch.testing.assert_close(link(x), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_of_float32_masters(serving, dtype):
    link = make_link(CONFIGS["outer"]).cuda()
    x = make_rows(5, link.config.in_features).cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
        y = link(x)
    assert y.dtype == torch.float32
    with torch.no_grad():
        truth, eager = (
            eager_twin(link.cpu(), torch.float64)(x.double().cpu()),
            eager_twin(link, dtype)(x.to(dtype).cpu()),
        )
    check_budget("y", y.cpu(), eager, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["inner", "inner-equation-3", "outer"])
def test_a_graph_replays_with_new_rows_and_new_weights(serving, kind):
    link = make_link(CONFIGS[kind], torch.bfloat16).cuda()
    rows = [make_rows(3, link.config.in_features, dtype=torch.bfloat16, seed=seed).cuda() for seed in range(3)]
    x = rows[0].clone()
    with torch.no_grad():
        link(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = link(x)
        for other in rows:
            x.copy_(other)
            link.proj1.weight.mul_(1.25)
            link.proj2.weight.mul_(0.75)
            graph.replay()
            assert torch.equal(y, link(other))


@pytest.mark.gpu
def test_weights_written_just_before_on_the_stream_are_the_ones_read(serving):
    """Weights are requested early, but never before what was launched ahead has finished."""
    link = make_link(CONFIGS["released"], torch.bfloat16).cuda()
    x = make_rows(2, link.config.in_features, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        for step in range(20):
            torch.cuda._sleep(1_000_000)
            for parameter in link.parameters():
                parameter.mul_(1.01 if step % 2 else 0.99)
            late = link(x)
            torch.cuda.synchronize()
            assert torch.equal(late, link(x))


@pytest.mark.gpu
def test_two_streams_at_once(serving):
    links = [make_link(CONFIGS["released"], torch.bfloat16, seed=seed).cuda() for seed in range(2)]
    x = make_rows(8, 1024, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        expected = [link(x) for link in links]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in links]
        results: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[index].append(links[index](x))
        torch.cuda.synchronize()
    for index, found in enumerate(results):
        assert all(torch.equal(y, expected[index]) for y in found)


@pytest.mark.gpu
def test_not_a_number_reaches_its_row_and_no_other(serving):
    link = make_link(CONFIGS["inner"], torch.bfloat16).cuda()
    x = make_rows(5, 40, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        clean = link(x)
        x[2, 7] = float("nan")
        y = link(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.gpu
def test_few_tokens_go_here_and_many_elsewhere(serving):
    with use_backend("auto"):
        assert choice.choose(CALL) is cuda
        assert choice.choose(CALL._replace(tokens=33)) is not cuda


@pytest.mark.gpu
def test_the_other_device_of_two(serving):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    link = make_link(CONFIGS["outer"], torch.bfloat16)
    x = make_rows(4, link.config.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = link.to("cuda:0")(x.to("cuda:0")).cpu()
        assert torch.equal(link.to("cuda:1")(x.to("cuda:1")).cpu(), expected)
        assert torch.cuda.current_device() == 0
