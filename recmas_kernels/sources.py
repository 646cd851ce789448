"""The digest that ties a compiled module to its sources: noted by the build, compared when the module is loaded.

setup.py runs this file by its path, before anything is installed: it needs the standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc", ".txt"}
_PARTS = {"cpu": ("CMakeLists.txt", "link.h", "cpu"), "cuda": ("link.h", "cuda")}


def digest(label: str, csrc: Path = CSRC) -> str | None:
    """Digest of what ``_cpu`` or ``_cuda`` is compiled from; None where the sources are not beside the package."""
    if not (csrc / "link.h").is_file():
        return None
    total = hashlib.sha256()
    for part in _PARTS[label]:
        place = csrc / part
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in _SUFFIXES:
                total.update(f"{path.relative_to(csrc).as_posix()}\n".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
