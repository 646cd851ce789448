"""Every model type is right, right with features off, or refused in one line, as `docs/models.md` says.

A run examines a third of the types, which the commit decides; ``RECMAS_FAMILIES=all`` examines all, in minutes.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import pytest
import transformers

from tests.runtime.families.matrix import TYPES, examine
from tests.runtime.families.page import cell, version, written

PARTS = 3


def chosen() -> tuple[str, ...]:
    """The types of this run: of the same commit, the same."""
    if os.environ.get("RECMAS_FAMILIES") == "all":
        return TYPES
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    commit = asked.stdout.strip() or transformers.__version__  # a copy without its history
    return TYPES[zlib.crc32(commit.encode()) % PARTS :: PARTS]


def test_every_type_has_its_row():
    assert version() != transformers.__version__ or set(written()) == set(TYPES)
    assert len(TYPES) > 250


@pytest.mark.parametrize("model_type", chosen())
def test_what_holds_of_a_type(model_type):
    result = examine(model_type)
    assert not result.faults
    if version() == transformers.__version__:
        assert cell(result) == written()[model_type]
