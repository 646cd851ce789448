"""The digest that ties a compiled module to its sources: noted by the build, compared when the module is loaded.

setup.py runs this file by its path, before anything is installed: it needs the standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc", ".txt", ".cmake"}
_CPU = ("python/*operands.h", "python/layer_arguments.h", "python/stand_ins.h", "python/unchanged.cpp")
_READING = ("python/arguments.h", "python/link_arguments.*", "python/tensors.*")
_PARTS = {
    "tensors": ("link.h", "python/CMakeLists.txt", "python/plain_link.*", "python/tensors_module.cpp", *_READING),
    "cpu": ("CMakeLists.txt", "link.h", "cpu/**/*", "python/cpu_*", *_CPU, *_READING),
    "cuda": ("link.h", "cuda/**/*", "python/cuda_*"),
}


def digest(label: str, csrc: Path = CSRC) -> str | None:
    """Digest of what ``_<label>`` is compiled from; None where the sources are not beside the package."""
    if not (csrc / "link.h").is_file():
        return None
    total = hashlib.sha256()
    for path in sorted({path for part in _PARTS[label] for path in csrc.glob(part)}):
        if path.suffix in _SUFFIXES:
            total.update(f"{path.relative_to(csrc).as_posix()}\n".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
