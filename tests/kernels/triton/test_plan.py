"""Which Triton kernels serve which link, what the backend declines. No kernel runs."""

from __future__ import annotations

import re
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recmas_kernels import explain, use_backend
from recmas_kernels.backends import choice
from recmas_kernels.backends import triton as backend
from recmas_kernels.backends.call import Call
from recmas_kernels.testing import configs, make_link, make_rows

triton = pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from recmas_kernels.backends.triton import library, plan  # noqa: E402
from recmas_kernels.backends.triton.device import launching  # noqa: E402

CPU = torch.device("cpu")


def link(hidden=2048, width=2048, residual="identity", dtype=torch.bfloat16, tokens=4096):
    return plan.Link(CPU, dtype, tokens, width, hidden, width, residual)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (link(), [plan.LIBRARY]),
        (link(hidden=256), [plan.SMALL, plan.LIBRARY]),
        (link(hidden=256, tokens=511), [plan.LIBRARY, plan.SMALL]),
        (link(hidden=512), [plan.LIBRARY, plan.SMALL]),
        (link(hidden=513), [plan.LIBRARY]),
        (link(hidden=256, residual="linear"), [plan.LIBRARY]),
        (link(hidden=256, width=2047), [plan.LIBRARY, plan.SMALL]),
        (link(hidden=256, dtype=torch.float32), [plan.LIBRARY, plan.SMALL]),
    ],
)
def test_the_default_is_the_first_of_the_variants_that_compute_the_link(chosen, expected):
    assert plan.candidates(chosen) == expected
    assert plan.variant(chosen) == expected[0]


@pytest.mark.parametrize(
    ("chosen", "lines"),
    [
        (
            link(),
            [
                "library: the default",
                "small: 2048 hidden features do not stay on chip, up to 512 do",
            ],
        ),
        (
            link(hidden=256),
            [
                "small: the default",
                "library: could serve it",
            ],
        ),
        (link(residual="linear"), ["library: the default", "small: a W3 is a large product of its own"]),
        (link(hidden=256, tokens=64), ["small: 64 tokens are few programs, 512 are enough"]),
        (link(hidden=300), ["small: masks of sizes that are no multiples of 16 spill registers"]),
    ],
)
def test_every_variant_comes_with_its_reason(chosen, lines):
    found = plan.describe(chosen)
    assert [line for line in found if line in lines] == lines, found


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


def test_an_outer_link_joins_its_operands_where_that_moves_fewer_bytes():
    sizes = 2048, 3072, 1536
    assert [plan.joins(tokens, *sizes) for tokens in (64, 15360, 15361, 65536)] == [False, False, True, True]
    assert not plan.joins(2**20, 2048, 3072, 1024)


@pytest.mark.parametrize(("hip", "calls"), [(None, 1), ("7.0", 0)])
def test_a_product_of_halves_into_float32_is_left_to_cuda(monkeypatch, hip, calls):
    """ROCm's products have no other dtype for their result; there, operands are cast."""
    product = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        left, right = (torch.empty(5, width, dtype=torch.bfloat16, device="cuda") for width in (3, 4))
        found = library.weight_gradient(left, right, torch.float32)
    assert (found.shape, found.dtype) == ((3, 4), torch.float32)
    assert [call.kwargs for call in product.call_args_list] == [{"out_dtype": torch.float32}] * calls


def test_a_device_with_little_shared_memory_gets_the_library(monkeypatch):
    monkeypatch.setattr(plan, "_shared_memory", lambda _: 64 * 1024)
    assert plan.candidates(link(hidden=256)) == [plan.LIBRARY]


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
