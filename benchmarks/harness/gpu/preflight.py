"""What ``make gpu`` needs and does not find.

Needs nothing but Python itself, since anything else may be what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

MODULES = ("torch", "triton", "numpy", "transformers", "pytest", "setuptools", "pybind11", "cmake", "ninja")
PROGRAMS = ("cmake", "ninja")  # where these are on PATH, their Python packages are not needed


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: CUDA_HOME, PATH, the usual folder."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def missing() -> list[str]:
    """Everything that is missing, each in a few words; what needs no torch to find out comes first."""
    found = []
    for name in MODULES:
        if importlib.util.find_spec(name) is None and not (name in PROGRAMS and shutil.which(name)):
            found.append(f"no Python package {name}")
    if not (shutil.which(os.environ["CUDACXX"]) if os.environ.get("CUDACXX") else tool("nvcc")):
        found.append("no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda")
    if importlib.util.find_spec("torch") is not None:
        found += _device()
    return found


def _device() -> list[str]:
    import torch

    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is built without CUDA"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device (nvidia-smi says whether the driver does)"]
    return []
