"""What one row of a batch takes on each device, from the lengths of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from recmas.config.pattern import Pattern, Visit
from recmas.devices.placement import Placement
from recmas.engine.fixed_shapes import bucket
from recmas.sizing.model_bytes import ModelBytes

BUCKET_ROWS = 2
"""Buffers of captured steps have at most so many times the rows of the batch."""


class Length(NamedTuple):
    """Positions of one prompt, slots filled, and of what the agent adds to it: latent steps or tokens."""

    prompt: int
    added: int


def added(visit: Visit, mode: str, latent_steps: Mapping[str, int], max_new_tokens: Mapping[str, int]) -> int:
    """Positions that an agent adds to its prompt."""
    latent = mode == "latent" and not visit.final
    return latent_steps[visit.role] if latent else max_new_tokens[visit.role]


def slot_positions(
    visit: Visit, pattern: Pattern, mode: str, latent_steps: Mapping[str, int], max_new_tokens: Mapping[str, int]
) -> int:
    """Positions of the messages in a prompt, at most; senders that meet in one slot share its positions."""
    each = [(latent_steps if mode == "latent" else max_new_tokens)[sender] for sender in visit.senders]
    return sum(each) if mode == "text" or pattern.combine == "slots" else max(each, default=0)


def longest(lengths: Iterable[Mapping[str, Length]]) -> dict[str, Length]:
    """By role, the longest of each: what padding makes of several rows, or several visits of one."""
    most: dict[str, Length] = {}
    for by_role in lengths:
        for role, length in by_role.items():
            held = most.get(role, Length(0, 0))
            most[role] = Length(max(held.prompt, length.prompt), max(held.added, length.added))
    return most


def row_bytes(
    shapes: Mapping[str, ModelBytes], placement: Placement, lengths: Mapping[str, Length], rounds: int
) -> dict[torch.device, int]:
    """Bytes per row on each device: the agent at work, and what every agent keeps.

    Kept are beginnings of prompts that later rounds, or other roles of the same model, will need, and on CUDA the
    buffers of captured steps.
    """
    taken: dict[torch.device, int] = {}
    for device in dict.fromkeys(placement.values()):
        here = [(shapes[role], length) for role, length in lengths.items() if placement[role] == device]
        work = (shape.cache(sum(length)) + shape.work(length.prompt) for shape, length in here)
        shared = len({shape for shape, _ in here}) < len(here)  # perhaps: models of one shape may be two
        kept = sum(shape.snapshot(length.prompt) for shape, length in here) if rounds > 1 or shared else 0
        if device.type == "cuda":
            kept += sum(BUCKET_ROWS * shape.snapshot(bucket(1, sum(length))[1]) for shape, length in here)
        taken[device] = max(work, default=0) + kept
    return taken
