"""Which backend serves a call, and the errors of asking for one that cannot."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from recmas_kernels import BackendUnavailableError, info, use_backend
from recmas_kernels.backends import choice, cpu
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.explain import explain_call
from recmas_kernels.testing import configs, make_link, make_rows

CALL = Call("link_fwd", "cpu", torch.float32, 4, 8, 8, 8, training=False)


def test_a_named_backend_never_falls_back():
    link, x = make_link(configs()["inner"]), make_rows(2, 40)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="does not serve cpu tensors"):
        link(x)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="float64"):
        link.double()(x.double())


def test_an_unknown_backend_is_named(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn': expected one of auto, reference"),
        use_backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("RECMAS_BACKEND", "turbo")
    with pytest.raises(ValueError, match="unknown backend 'turbo'"):
        make_link(configs()["inner"])(make_rows(2, 40))


def test_the_environment_chooses_and_the_context_overrides(monkeypatch):
    monkeypatch.setenv("RECMAS_BACKEND", "reference")
    assert choice.choose(CALL).__name__ == "recmas_kernels.reference"
    with use_backend("auto"):
        assert choice.requested() == "auto"
    assert choice.requested() == "reference"


def test_auto_serves_float64_and_unknown_devices_by_the_reference():
    for call in (CALL._replace(dtype=torch.float64), CALL._replace(device="meta")):
        assert choice.choose(call).__name__ == "recmas_kernels.reference"


def test_a_block_of_another_thread_may_end_first():
    first, second = use_backend("reference"), use_backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choice.requested() == "auto"
    second.__exit__(None, None, None)


YIELDED = "plain torch is faster in training with float32 products of this size on this processor"


@pytest.fixture
def processor_with_amx(monkeypatch):
    monkeypatch.delenv("RECMAS_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "_native", lambda: SimpleNamespace(best_isa=lambda: cpu.ISAS.index("amx")))
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    choice._serving.cache_clear()
    yield
    choice._serving.cache_clear()


@pytest.mark.parametrize(
    ("change", "server"),
    [
        ({"op": "link_fwd_train", "training": True}, "recmas_kernels.reference"),
        ({"op": "link_bwd", "training": True}, "recmas_kernels.reference"),
        ({}, "recmas_kernels.backends.cpu"),
        ({"tokens": 4096}, "recmas_kernels.backends.cpu"),
        ({"op": "link_fwd_train", "training": True, "tokens": 127}, "recmas_kernels.backends.cpu"),
        ({"op": "link_fwd_train", "training": True, "hidden_features": 128}, "recmas_kernels.backends.cpu"),
        ({"op": "link_bwd", "training": True, "dtype": torch.bfloat16}, "recmas_kernels.backends.cpu"),
        ({"op": "alignment_fwd", "training": True}, "recmas_kernels.backends.cpu"),
    ],
    ids=str,
)
def test_the_library_gets_what_it_does_faster(processor_with_amx, monkeypatch, change, server):
    """What a backend yields is served by the next; a backend that was named, or an instruction set, keeps it."""
    call = Call("link_fwd", "cpu", torch.float32, 128, 2048, 2048, 2048, training=False)._replace(**change)
    assert choice.choose(call).__name__ == server
    assert (f"cpu: {YIELDED}\n  reference: serves" in explain_call(call)) == server.endswith("reference")
    with use_backend("cpu"):
        assert choice.choose(call) is cpu
        assert YIELDED not in explain_call(call)
    for reduced in ("bf16", "tf32"):
        with monkeypatch.context() as patch:
            for module in (choice, cpu):
                patch.setattr(module, "float32_products", lambda reduced=reduced: reduced)
            assert choice.choose(call) is cpu
    monkeypatch.setenv("RECMAS_CPU_ISA", "amx")
    choice._serving.cache_clear()
    assert choice.choose(call) is cpu


def test_the_page_says_what_is_yielded(processor_with_amx):
    assert info._yielded("cpu") == {"cpu": YIELDED}


def test_float32_stays_float32_where_torch_rounds_it():
    """A switch that programs set for their GPU; with AMX, products of float32 on a CPU are in bf16 then."""
    code = """
        import torch
        from recmas_kernels import LinkConfig
        from recmas_kernels.testing import eager_twin, make_link, make_rows, relative_error, run
        link, x = make_link(LinkConfig("inner", 1024, 1024, 1024, "identity")), make_rows(128, 1024)
        dy = make_rows(128, 1024, seed=2)
        exact = run(eager_twin(link, torch.float64), x.double(), dy.double())
        run(link, x, dy)
        torch.set_float32_matmul_precision("medium")
        found = run(link, x, dy)
        assert relative_error(found.y, exact.y) < 1e-5
        assert all(relative_error(grad, exact.grads[name]) < 1e-5 for name, grad in found.grads.items())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
