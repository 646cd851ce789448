"""Which Triton kernels serve which link, what the backend declines, and what tuning remembers. No kernel runs."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch

from recmas_kernels import explain, use_backend
from recmas_kernels.backends import choice
from recmas_kernels.backends import triton as backend
from recmas_kernels.backends.call import Call
from recmas_kernels.testing import configs, make_link, make_rows

triton = pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from recmas_kernels.backends.triton import plan, tuning  # noqa: E402
from recmas_kernels.backends.triton.device import launching  # noqa: E402

CPU = torch.device("cpu")


def link(hidden=2048, width=2048, residual="identity", dtype=torch.bfloat16, tokens=4096):
    return plan.Link("train", CPU, dtype, tokens, width, hidden, width, residual, True)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (link(), [plan.LIBRARY, plan.MATMUL]),
        (link(hidden=256), [plan.SMALL, plan.LIBRARY, plan.MATMUL]),
        (link(hidden=256, tokens=511), [plan.LIBRARY, plan.MATMUL, plan.SMALL]),
        (link(hidden=512), [plan.LIBRARY, plan.MATMUL, plan.SMALL]),
        (link(hidden=513), [plan.LIBRARY, plan.MATMUL]),
        (link(hidden=256, residual="linear"), [plan.LIBRARY, plan.MATMUL]),
        (link(hidden=256, width=2047), [plan.LIBRARY, plan.MATMUL, plan.SMALL]),
        (link(hidden=256, dtype=torch.float32), [plan.LIBRARY, plan.MATMUL, plan.SMALL]),
    ],
)
def test_the_default_is_the_first_of_the_variants_that_compute_the_link(chosen, expected):
    assert plan.candidates(chosen) == expected
    assert plan.variant(chosen, lambda _: None) == expected[0]


@pytest.mark.parametrize(
    ("chosen", "lines"),
    [
        (
            link(),
            [
                "library: the default",
                "matmul: never the default before it has been timed",
                "small: 2048 hidden features do not stay on chip, up to 512 do",
                "tensor descriptors: fit",
            ],
        ),
        (
            link(hidden=256),
            [
                "small: the default",
                "library: could serve it",
                "matmul: never the default before it has been timed",
                "tensor descriptors: fit",
            ],
        ),
        (link(residual="linear"), ["library: the default", "small: a W3 is a large product of its own"]),
        (link(hidden=256, tokens=64), ["small: 64 tokens are few programs, 512 are enough"]),
        (link(hidden=300), ["small: masks of sizes that are no multiples of 16 spill registers"]),
        (link(hidden=300), ["tensor descriptors: rows of 600 bytes are no multiple of 16"]),
        (link(dtype=torch.float32), ["tensor descriptors: exact float32 products have no use for tensor descriptors"]),
    ],
)
def test_every_variant_comes_with_its_reason(chosen, lines):
    found = plan.describe(chosen)
    assert [line for line in found if line in lines] == lines, found


def test_a_tuned_answer_is_named(monkeypatch):
    monkeypatch.setattr(tuning, "recall", lambda *_: plan.MATMUL)
    found = plan.describe(link(hidden=256))
    assert found[0] == "matmul: the fastest when tuned on this device"
    assert "small: slower when tuned" in found


def test_explain_shows_the_variants_of_the_backend_that_serves(monkeypatch):
    monkeypatch.setitem(choice.ORDER, "cpu", ("triton", "reference"))
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    outer = make_link(configs()["outer"])
    text = explain(outer, make_rows(3, 40))
    assert text.splitlines()[:3] == [
        "link_fwd_train cpu float32 3 x 40 -> 46 -> 23:",
        "  triton: serves this call",
        "    library: the default",
    ]
    assert "    small: a W3 is a large product of its own" in text
    with use_backend("reference"):
        assert "library" not in explain(outer, make_rows(3, 40))


def test_wide_tiles_where_they_fill_the_device():
    wide, narrow = (128, 256), (128, 128)

    def first(results, dtype=torch.bfloat16, **options):
        return plan.matmul_configs(results, dtype, CPU, **options)[0][:2]

    assert first([(16384, 1536)]) == wide
    assert first([(1536, 1536)]) == narrow
    assert first([(16384, 1536)], wide=False) == narrow
    assert first([(1536, 2048), (1536, 1536), (1536, 2048)]) == wide  # 264 tiles: two full waves of 132
    assert first([(16384, 1536)], torch.float32) == (64, 64)


def test_a_device_with_little_shared_memory_gets_the_library(monkeypatch):
    monkeypatch.setattr(plan, "_shared_memory", lambda _: 64 * 1024)
    assert plan.candidates(link(hidden=256)) == [plan.LIBRARY]


@pytest.mark.parametrize(
    ("capability", "shared_memory", "dtype", "reason"),
    [
        ((9, 0), 232448, torch.bfloat16, None),
        ((8, 0), 166912, torch.bfloat16, "sm_80 has no tensor descriptors"),
        ((12, 0), 101376, torch.bfloat16, "99 KB of shared memory"),
        ((9, 0), 232448, torch.float32, "float32"),
    ],
    ids=str,
)
def test_devices_without_a_copy_engine(monkeypatch, capability, shared_memory, dtype, reason):
    monkeypatch.setattr(plan, "_capability", lambda _: capability)
    monkeypatch.setattr(plan, "_shared_memory", lambda _: shared_memory)
    found = plan.no_copy_engine(CPU, dtype)
    assert found is None if reason is None else reason in found


def test_persistent_tiles_are_no_default():
    configs = plan.matmul_configs([(16384, 1536)], torch.bfloat16, CPU)
    assert not any(config.persistent for config in configs)
    assert all(config.persistent for config in plan.persistent_configs())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"in_features": 8193}, "up to 8192 features, got 8193"),
        ({"hidden_features": 0}, "a size is zero"),
        ({"op": "handoff_fwd", "dtype": torch.float64, "hidden_features": 0, "out_features": 9000}, None),
        ({"op": "alignment_fwd", "hidden_features": 0}, None),
    ],
)
def test_declines_name_the_reason(change, reason):
    call = Call("link_fwd", "cuda", torch.bfloat16, 64, 2048, 2048, 2048, training=False)
    found = backend.declines(call._replace(**change))
    assert found is None if reason is None else reason in found


def test_a_driver_that_does_not_start_is_a_reason(monkeypatch):
    class Driver:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    backend.unavailable.cache_clear()
    assert "takes a C compiler and Python's headers (Failed to find C compiler)" in backend.unavailable()
    backend.unavailable.cache_clear()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
            "before recording",
        ),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), "link_fwd on cpu, 3 x 40 in float32: Triton Error"),
        (OutOfResources(300000, 232448, "shared memory"), "link_fwd on cpu, 3 x 40 in float32: out of resource"),
    ],
)
def test_a_failed_launch_names_op_and_shape(error, words):
    with pytest.raises(RuntimeError, match=re.escape(words)), launching("link_fwd", torch.empty(3, 40)):
        raise error


def test_other_errors_pass_as_they_are():
    with pytest.raises(torch.OutOfMemoryError, match="^full$"), launching("link_fwd", torch.empty(3, 40)):
        raise torch.OutOfMemoryError("full")


def test_without_triton_the_reason_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    backend.unavailable.cache_clear()
    assert "triton cannot be imported" in backend.unavailable()
    monkeypatch.undo()
    backend.unavailable.cache_clear()


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A pretended GPU whose answers are kept in a folder of the test's own."""
    monkeypatch.setenv("RECMAS_TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU 80GB")
    monkeypatch.setattr(tuning, "_answers", {})
    monkeypatch.setattr(tuning, "_recalled", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seconds = {"slow": 2.0, "fast": 1.0, "default": 1.5}
    monkeypatch.setattr(tuning, "milliseconds", lambda run: seconds[run()])
    return torch.device("cuda", 0)


def ask(device, options=("default", "fast", "slow")):
    return tuning.choose("variant", ("train", 64), device, options, lambda option: option)


def test_nothing_is_timed_unless_asked_for(device, tmp_path):
    assert ask(device) == "default"
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_is_remembered_across_processes(device, monkeypatch, tmp_path):
    monkeypatch.setenv("RECMAS_TUNE", "1")
    assert ask(device) == "fast"
    monkeypatch.delenv("RECMAS_TUNE")
    monkeypatch.setattr(tuning, "_answers", {})
    monkeypatch.setattr(tuning, "_recalled", {})
    assert ask(device) == "fast"
    assert [file.name for file in tmp_path.iterdir()] == [f"Some-GPU-80GB-{tuning.fingerprint()}.json"]
    assert ask(device, ("default", "slow")) == "default"  # an answer that is no longer an option is not followed


def test_nothing_is_timed_while_a_graph_records(device, monkeypatch):
    monkeypatch.setenv("RECMAS_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(device) == "default"


def test_an_option_that_does_not_fit_the_device_is_the_slowest(monkeypatch):
    def too_large(run, **_):
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", too_large)
    assert tuning.milliseconds(lambda: None) == math.inf


def test_a_damaged_file_is_named(device, tmp_path):
    tuning.path("Some GPU 80GB").write_text("{")
    with pytest.raises(RuntimeError, match=r"cannot read the tuning file .*Some-GPU-80GB"):
        ask(device)
