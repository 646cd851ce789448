"""A system for comparisons."""

from __future__ import annotations

import pytest
import torch

from recmas.recursive_mas import RecursiveMAS
from tests.runtime.training.by_hand import build


@pytest.fixture(scope="module")
def exact() -> RecursiveMAS:
    """In float64; tests must not change it."""
    return build(dtype=torch.float64)
