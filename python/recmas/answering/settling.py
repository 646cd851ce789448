"""When a question needs no further round: what its last agent sends has settled."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.functional import cosine_similarity

from recmas.engine.messages import Latents, Message, select


class Settling:
    """Compares what the last agent of a batch sends in a round with what it sent in the round before.

    Args:
        least: a row's latents, all of them as one vector, have settled where their cosine with those of the round
            before is at least this. A text has settled where it is the same.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._before: Message | None = None

    def settled(self, message: Message) -> list[bool]:
        """By row, after a round that is not the last one; nothing has settled after the first."""
        before, self._before = self._before, message
        if isinstance(message, Latents):
            if not isinstance(before, Latents):
                return [False] * len(message.states)
            now, then = (latents.states.flatten(1).float() for latents in (message, before))
            found: list[bool] = (cosine_similarity(now, then) >= self._least).tolist()
            return found
        if not isinstance(before, list):
            return [False] * len(message)
        return [text == earlier for text, earlier in zip(message, before, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        assert self._before is not None
        self._before = select(self._before, rows)
