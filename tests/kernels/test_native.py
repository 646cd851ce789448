"""The compiled modules: built from the sources beside them, and reading tensors the same by either way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, alignment_loss, clear_packed, sources
from recmas_kernels.backends import cpu, native
from tests.kernels.helpers import configs, make_link, make_rows

ROOT = Path(sources.__file__).parent.parent
compiled = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def test_the_digest_is_that_of_every_source(tmp_path):
    assert sources.digest("cpu", tmp_path) is None
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    whole = {label: sources.digest(label, csrc) for label in ("cpu", "cuda")}
    assert whole["cpu"] == sources.digest("cpu")
    for name, changed in {
        "cpu/bindings.cpp": {"cpu"},
        "cpu/product.h": {"cpu"},
        "cuda/handoff.cu": {"cuda"},
        "link.h": {"cpu", "cuda"},
        "tests/test_cpu.cpp": set(),
    }.items():
        path = csrc / name
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert {label for label in whole if sources.digest(label, csrc) != whole[label]} == changed, name
        path.write_bytes(text)


@compiled
def test_a_module_of_other_sources_is_refused(monkeypatch):
    assert native.load("cpu").sources == sources.digest("cpu")
    monkeypatch.setattr(sources, "digest", lambda label: "another")
    with (
        pytest.warns(RuntimeWarning, match="rebuild"),
        pytest.raises(ImportError, match="other sources.*rebuild it with"),
    ):
        native.load("cpu")
    monkeypatch.setattr(sources, "digest", lambda label: None)  # an installed copy
    native.load("cpu")


@compiled
def test_info_and_a_backend_asked_for_by_name_say_what_to_do(tmp_path):
    for folder in ("recmas_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "csrc" / "link.h").open("a") as header:
        header.write("// changed\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}

    def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True)

    page = python("-m", "recmas_kernels.info").stdout
    assert "_cpu: " in page
    assert "rebuild it with python setup.py build_ext --inplace" in page
    call = "import torch, recmas_kernels as r; r.FusedRecursiveLink.inner(8)(torch.zeros(1, 8))"
    assert python("-c", call).returncode == 0, "auto serves by the reference"
    refused = python("-c", call, RECMAS_BACKEND="cpu")
    assert "BackendUnavailableError" in refused.stderr
    assert "rebuild it with" in refused.stderr


@pytest.fixture
def attribute_reading():
    """A torch without DLPack's table of C functions."""
    cpu._native().connect(torch, None)
    yield
    cpu._native.cache_clear()
    cpu._native()


def everything(link: FusedRecursiveLink) -> list[torch.Tensor]:
    clear_packed()
    x = make_rows(3, link.config.in_features).requires_grad_()
    y = link(x)
    y.backward(make_rows(3, link.config.out_features, seed=2))
    loss = alignment_loss(y.detach().requires_grad_(), make_rows(9, y.shape[1]), token_ids=torch.tensor([0, 8, 8]))
    results = [y.detach(), x.grad, loss.detach()]
    for parameter in link.parameters():
        results.append(parameter.grad)
        parameter.grad = None
    with torch.no_grad():
        results += [link(x) for _ in range(3)]  # packed where large enough
        results.append(link(x.unsqueeze(1)[:, :, ::1].expand(-1, 2, -1)))
    return results


@compiled
@pytest.mark.parametrize("kind", configs())
def test_both_ways_of_reading_tensors_agree(kind, request):
    link = make_link(configs()[kind])
    expected = everything(link)
    request.getfixturevalue("attribute_reading")
    for found, wanted in zip(everything(link), expected, strict=True):
        assert torch.equal(found, wanted)


@compiled
def test_the_native_calls_refuse_what_does_not_fit():
    x, w = make_rows(3, 8), make_rows(8, 8)
    settings = (0, 1, 0, 1, 0, 1e-5)

    def forward(x: object, w1: object, y: object) -> bool:
        parameters = (w1, None, w, *[None] * 7)
        return cpu._native().link_forward(*settings, x, *parameters, False, False, False, y, None, None, None)

    assert forward(x, w, torch.empty(3, 8))
    with pytest.raises(ValueError, match="w1 has another shape than the call"):
        forward(x, make_rows(8, 7), torch.empty(3, 8))
    with pytest.raises(ValueError, match="y has another shape than the call"):
        forward(x, w, torch.empty(2, 8))
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        forward([1.0], w, torch.empty(3, 8))
    with pytest.raises(TypeError, match="expected 24 arguments, got 1"):
        cpu._native().link_forward(0)
    assert not forward(x, w.double(), torch.empty(3, 8)), "another dtype is for the caller to convert"
    assert not forward(x, w.t(), torch.empty(3, 8)), "and so are other strides"
