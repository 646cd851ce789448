"""Messages of rows that come from several batches, as one message of one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recmas.engine.messages import Latents, Message

Place = tuple[int, int] | None
"""Which of the batches, and which row of it; None for a row without a message."""


def gather(batches: Sequence[Message], places: Sequence[Place]) -> Message:
    """One message per row of a new batch.

    Args:
        batches: latents, or texts.
        places: of each row of the new batch.

    Raises:
        ValueError: latents and texts among each other.
    """
    if all(isinstance(batch, list) for batch in batches):
        return ["" if place is None else batches[place[0]][place[1]] for place in places]  # type: ignore[index]
    states = [batch.states for batch in batches if isinstance(batch, Latents)]
    if len(states) < len(batches):
        raise ValueError("latents and texts in one batch")
    if len(states) == 1 and list(places) == [(0, row) for row in range(states[0].shape[0])]:
        return batches[0]
    steps = max(part.shape[1] for part in states)
    joined = states[0].new_zeros(len(places), steps, states[0].shape[2])
    lengths = torch.zeros(len(places), dtype=torch.int64)
    for index, place in enumerate(places):
        if place is not None:
            row = states[place[0]][place[1]]
            joined[index, : row.shape[0]] = row
            lengths[index] = row.shape[0]
    return Latents(joined, None if bool((lengths == steps).all()) else lengths)
