"""Every model type is right, right with features off, or refused in one line, as `docs/models.md` says.

A run examines a fifth of the types by all of their proofs, and every second of these by one of the checks; the commit
decides which. That takes less than 20 seconds of one processor.
``RECMAS_FAMILIES=all`` makes every check of every type, in minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from recmas.engine import abilities
from recmas.engine.abilities import Proof
from tests.runtime.families.matrix import CASES, CHECKS, TYPES, examine
from tests.runtime.families.page import cell, version, written

PARTS = 5


def commit() -> str:
    if (git := shutil.which("git")) is None:
        return transformers.__version__
    asked = subprocess.run(
        [git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or transformers.__version__  # a copy without its history


def chosen() -> dict[str, tuple[str, ...]]:
    """Types and their checks in this run: of the same commit, the same."""
    if os.environ.get("RECMAS_FAMILIES") == "all":
        return dict.fromkeys(CASES, tuple(CHECKS))
    draw = random.Random(commit())
    part = CASES[draw.randrange(PARTS) :: PARTS]
    return {name: (draw.choice(list(CHECKS)),) if at % 2 else () for at, name in enumerate(part)}


CHOSEN = chosen()


def test_every_type_has_its_row():
    assert version() != transformers.__version__ or set(written()) == set(CASES)
    assert len(TYPES) > 250


@pytest.mark.parametrize("model_type", CHOSEN)
def test_what_holds_of_a_type(model_type):
    result = examine(model_type, CHOSEN[model_type])
    assert not result.faults
    if version() == transformers.__version__:
        assert cell(result) == written()[model_type]


@pytest.mark.parametrize(
    ("model_type", "check"),
    [
        ("jamba", "decoding with tool replies"),
        ("bart", "teacher forcing"),
    ],
)
def test_a_claim_that_is_not_true_is_a_fault(model_type, check, monkeypatch):
    """Were every proof to hold, whatever it found, these types would be silently wrong or raise."""
    assert not examine(model_type, [check]).faults
    monkeypatch.setattr(abilities, "proof", lambda *_: Proof(True, 0.0, 0.0, "claimed"))
    (fault,) = examine(model_type, [check]).faults
    assert fault.startswith(f"{check}: ")
