"""The relay lab's questions, and which of them a system answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recmas import RecursiveMAS
from recmas.answering.answers import Answers
from recmas.evaluation import METRICS
from recmas.lab.world import questions

RELAY = Path(__file__).resolve().parents[2] / "examples" / "relay"
WORLDS = 2027
"""Seed of the test worlds; links are chosen and settings were tried on others."""
HOPS = (1, 2, 3)
BATCH = 256


def relay() -> RecursiveMAS:
    """The shipped system."""
    return RecursiveMAS.from_pretrained(RELAY)


def asked(count: int, split: str = "test") -> list[dict[str, object]]:
    """So many questions of 1 to 3 hops, of a split of their own where something is to be chosen by them.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"questions: {count} are too few, expected 2 or more")
    return questions(split, WORLDS, HOPS, count)


def heading(count: int) -> dict[str, Any]:
    """What a record says of its questions."""
    return {"questions": {"count": count, "seed": WORLDS, "hops": HOPS}}


def right(answers: Answers, rows: Sequence[dict[str, object]]) -> list[int]:
    """1 for each question that is answered rightly, 0 for each other one."""
    pairs = zip(answers, rows, strict=True)
    return [int(METRICS["last_word"](answer.text, str(row["answer"]))) for answer, row in pairs]
