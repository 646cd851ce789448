"""Sends CPU tensors through the public functions to the Triton backend, which the dispatch table never does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton import language
from triton.runtime import interpreter

from recmas_kernels import use_backend
from recmas_kernels.backends import choice
from recmas_kernels.backends.triton import activation, plan, rows
from recmas_kernels.testing import poisoned_allocations

torch.set_num_threads(1)
_patch, _patched = interpreter._patch_lang, set[tuple[bool, bool]]()


def _patch_once(function: Any) -> Any:
    """What stands for the language is put in its place once, not at every call of every function: a third of the time.

    Functions of ours see `triton.language`, those of Triton's library its core.
    """
    seen = list(map(id, function.__globals__.values()))
    places = id(language) in seen, id(language.core) in seen
    if places not in _patched:
        _patched.add(places)
        _patch(function)  # for good: this process interprets all
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def triton_serves_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton alone, with NaN in whatever it allocates, and tiles so small that small inputs have several of each."""
    monkeypatch.setitem(choice.ORDER, "cpu", ("triton",))
    monkeypatch.setattr(rows, "PROGRAMS", 3)
    monkeypatch.setattr(activation, "TILE_COLUMNS", 32)
    monkeypatch.setattr(activation, "SUM_BLOCKS", 2)
    monkeypatch.setattr(plan, "small_config", lambda *_, backward: plan.SmallConfig(32, 16, 4, 2))
    with use_backend("triton"), poisoned_allocations():
        yield
