"""Systems of the same agents with links of several seeds, asked the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recmas import RecursiveMAS
from recmas.lab.build import RECORD

Measured = tuple[dict[str, Any], list[dict[str, Any]]]
"""What a record says of its questions, and its cells."""


def each(labs: Sequence[Path], measure: Callable[[RecursiveMAS], Measured]) -> Measured:
    """The cells of every lab, with its link seed.

    Args:
        labs: one whose agents these are, and what ``recmas lab build --agents`` wrote with them.
        measure: asks one system.

    Raises:
        ValueError: two labs are of one link seed, or of other agents.
    """
    head: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    for lab, seed in zip(labs, link_seeds(labs), strict=True):
        head, found = measure(RecursiveMAS.from_pretrained(lab))
        cells += [{"link_seed": seed, **cell} for cell in found]
    return head, cells


def link_seeds(labs: Sequence[Path]) -> list[int]:
    """Of each lab; raises as `each` does."""
    seeds: list[int] = []
    agents = None
    for lab in labs:
        built = json.loads((lab / RECORD).read_text(encoding="utf-8"))
        agents = agents or built["pretraining"]
        if built["pretraining"] != agents:
            raise ValueError(f"{lab}: its agents are not those of {labs[0]}")
        if built["link_seed"] in seeds:
            raise ValueError(f"{lab}: its link seed, {built['link_seed']}, is another lab's, too")
        seeds.append(built["link_seed"])
    return seeds
