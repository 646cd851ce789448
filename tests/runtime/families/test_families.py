"""Every model type is right, right with features off, or refused in one line, as `docs/models.md` says.

A run examines a third of the types, each by all of its proofs and two of the checks; the commit decides which.
``RECMAS_FAMILIES=all`` makes every check of every type, in minutes.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
import transformers

from recmas.engine import abilities
from recmas.engine.abilities import Proof
from tests.runtime.families.matrix import CHECKS, TYPES, examine
from tests.runtime.families.page import cell, version, written

PARTS = 3
MANY = os.environ.get("RECMAS_FAMILIES") == "all"


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or transformers.__version__  # a copy without its history


def chosen() -> list[tuple[str, tuple[str, ...]]]:
    """Types and their checks in this run: of the same commit, the same."""
    if MANY:
        return [(model_type, tuple(CHECKS)) for model_type in TYPES]
    draw = random.Random(commit())
    first = draw.randrange(PARTS)
    return [(model_type, tuple(draw.sample(list(CHECKS), 2))) for model_type in TYPES[first::PARTS]]


def test_every_type_has_its_row():
    assert version() != transformers.__version__ or set(written()) == set(TYPES)
    assert len(TYPES) > 250


@pytest.mark.parametrize(("model_type", "checks"), chosen(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_holds_of_a_type(model_type, checks):
    result = examine(model_type, checks)
    assert not result.faults
    if version() == transformers.__version__:
        assert cell(result) == written()[model_type]


@pytest.mark.parametrize(
    ("model_type", "check"),
    [
        ("jamba", "decoding with tool replies"),
        ("recurrent_gemma", "rollout of a ragged batch"),
        ("gemma4_text", "outer training, forced"),
    ],
)
def test_a_claim_that_is_not_true_is_a_fault(model_type, check, monkeypatch):
    """Were every proof to hold, whatever it found, these types would be silently wrong or raise."""
    assert not examine(model_type, [check]).faults
    monkeypatch.setattr(abilities, "proof", lambda *_: Proof(True, 0.0, 0.0, "claimed"))
    (fault,) = examine(model_type, [check]).faults
    assert fault.startswith(f"{check}: ")
