"""How much of a batch of prompts need not run, since a snapshot has it."""

from __future__ import annotations

from transformers import PreTrainedModel

from recmas.engine.cache_snapshot import Snapshot
from recmas.engine.continuation import Continuation
from recmas.engine.messages import Prompt
from recmas.engine.model_state import ModelState
from recmas.engine.padded_rows import PaddedRows


class KnownBeginning:
    """The columns that a batch of prompts begins with and that are known.

    Args:
        decoder: reads the prompts.
        state: its own, now.
        prompt: the batch.
        rows: its token ids.

    Attributes:
        computed: positions that ran here, for all rows at once.
    """

    def __init__(self, decoder: PreTrainedModel, state: ModelState, prompt: Prompt, rows: PaddedRows) -> None:
        self._decoder, self._state, self._prompt, self._rows = decoder, state, prompt, rows
        self._cut = 0
        self._source: Snapshot | None = None
        self.computed = 0

    def offer(self, snapshot: Snapshot) -> None:
        """Take this snapshot if it has more than those before."""
        if (cut := snapshot.cut(self._rows.ids, self._rows.pads, self._rows.last)) > self._cut:
            self._cut, self._source = cut, snapshot

    def read_on(self, columns: int) -> None:
        """Read so many columns, in which all rows agree, by one row for all, if that pays."""
        if not self._rows.pays(columns, self._cut):
            return
        row = slice(self._rows.longest, self._rows.longest + 1)
        mask = self._prompt.mask[row, :columns]
        if self._source is None:
            begun = Continuation(self._decoder, mask, 0)
        else:
            begun = self._source.select([row.start]).resume(mask, self._cut, [0], 0, None)
        begun.feed(self._prompt.embeds[row, self._cut : columns])
        self.computed += columns - self._cut
        ids = self._rows.ids[row.start][:columns]
        self._cut, self._source = columns, Snapshot.of(begun, self._state, [ids], [0])

    def resume(self, room: int, context: int | None) -> Continuation | None:
        """The prompts, of which what is known has been read; None where nothing is."""
        if self._source is None:
            return None
        return self._source.resume(self._prompt.mask, self._cut, self._rows.pads, room, context)
