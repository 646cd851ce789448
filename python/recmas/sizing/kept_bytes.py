"""What outlives a batch on each device: what prompts begin with (`recmas.engine.constant_prefixes`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from recmas.devices.placement import Placement
from recmas.engine.constant_prefixes import LEAST_POSITIONS
from recmas.sizing.model_bytes import ModelBytes


def kept_bytes(
    shapes: Mapping[str, ModelBytes], placement: Placement, prefixes: Mapping[str, Iterable[int]]
) -> dict[torch.device, int]:
    """Bytes on each device, whatever the batch.

    Args:
        shapes: by role.
        placement: by role.
        prefixes: by role, positions of what the prompts of each of its templates begin with; short ones are not kept.
    """
    kept = dict.fromkeys(placement.values(), 0)
    for role, lengths in prefixes.items():
        kept[placement[role]] += sum(shapes[role].snapshot(each) for each in lengths if each >= LEAST_POSITIONS)
    return kept
