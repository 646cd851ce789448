"""The digest of a compiled module's sources: every file that it is compiled from counts, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path

from recmas_kernels import sources

ROOT = Path(sources.__file__).parent.parent
LABELS = ("tensors", "cpu", "cuda")


def test_the_digest_is_that_of_every_source(tmp_path):
    assert sources.digest("cpu", tmp_path) is None
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    whole = {label: sources.digest(label, csrc) for label in LABELS}
    assert whole["cpu"] == sources.digest("cpu")
    for name, changed in {
        "python/cpu_link.cpp": {"cpu"},
        "python/operands.h": {"cpu"},
        "python/plain_link.cpp": {"tensors"},
        "python/CMakeLists.txt": {"tensors"},
        "python/tensors.cpp": {"tensors", "cpu"},
        "python/cuda_module.cpp": {"cuda"},
        "cpu/product.h": {"cpu"},
        "cuda/link.cu": {"cuda"},
        "link.h": {"tensors", "cpu", "cuda"},
        "tests/test_cpu.cpp": set(),
    }.items():
        path = csrc / name
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert {label for label in whole if sources.digest(label, csrc) != whole[label]} == changed, name
        path.write_bytes(text)


def test_every_source_counts_for_some_module(tmp_path):
    """A new file under csrc that no digest covers could change a module unnoticed."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    whole = {label: sources.digest(label, csrc) for label in LABELS}
    files = [path for path in sorted(csrc.rglob("*")) if path.is_file() and path.suffix != ".py"]
    compiled = [path for path in files if path.relative_to(csrc).parts[0] != "tests"]
    assert len(compiled) > 20
    for path in compiled:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert any(sources.digest(label, csrc) != whole[label] for label in LABELS), path
        path.write_bytes(text)
