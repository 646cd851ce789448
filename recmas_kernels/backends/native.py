"""Loading a compiled module, provided that it was built from the sources beside it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch  # before any compiled module, which then shares torch's OpenMP runtime

from recmas_kernels import sources


def load(label: str) -> ModuleType:
    """``recmas_kernels._<label>``, ready to read torch's tensors if it is one that does.

    Raises:
        ImportError: it was never built, does not load, or was compiled from other sources than ``csrc`` holds now: code
            of another version may read its arguments differently and return anything. An installed package has no
            ``csrc`` beside it, and contains the modules that were built with it.
    """
    module = importlib.import_module(f"recmas_kernels._{label}")
    expected, built_from = sources.digest(label), getattr(module, "sources", None)
    if expected is not None and built_from != expected:
        reason = (
            f"{module.__file__} was built from other sources (digest {built_from}) than csrc holds ({expected}): "
            "rebuild it with python setup.py build_ext --inplace, or pip install -e ."
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        raise ImportError(reason)
    connect = getattr(module, "connect", None)
    if connect is not None:
        # DLPack's table of C functions, where this torch has it; Python attributes are read otherwise.
        connect(torch, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    return module
