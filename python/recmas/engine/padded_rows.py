"""The token ids of left-padded prompts, by columns."""

from __future__ import annotations

from dataclasses import dataclass

from recmas.engine.cache_snapshot import Ids, common_columns
from recmas.engine.constant_prefixes import LEAST_POSITIONS
from recmas.engine.messages import Prompt


@dataclass(frozen=True)
class PaddedRows:
    """What is known of the tokens of a batch of prompts.

    Attributes:
        ids: before the first slot of each row; none where they are not known.
        pads: columns of padding before them.
        width: columns of all prompts.
    """

    ids: Ids
    pads: list[int]
    width: int

    @classmethod
    def of(cls, prompt: Prompt) -> PaddedRows:
        pads = [int(count) for count in (prompt.mask == 0).sum(dim=1)]
        return cls([[]] * len(pads) if prompt.prefix is None else prompt.prefix, pads, prompt.mask.shape[1])

    @property
    def positions(self) -> int:
        """Without padding."""
        return len(self.pads) * self.width - sum(self.pads)

    @property
    def last(self) -> int:
        """The last column before which a prompt may be cut, so that one is left to run."""
        return self.width - 1

    @property
    def longest(self) -> int:
        """The first row that has no padding."""
        return self.pads.index(0)

    def alike(self) -> int:
        """How many tokens all rows begin alike with."""
        return common_columns(self.ids, [self.ids[0]] * len(self.ids), [0] * len(self.ids), self.last)

    def before(self, cut: int) -> int:
        """Positions in the columns before `cut`."""
        return sum(max(cut - pad, 0) for pad in self.pads)

    def pays(self, columns: int, cut: int) -> bool:
        """Whether to read tokens that all begin with, from `cut` to `columns`, once for all rows."""
        more = columns - cut
        return more > 0 and sum(max(columns - max(cut, pad), 0) for pad in self.pads) - more >= LEAST_POSITIONS
