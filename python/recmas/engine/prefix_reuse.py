"""Prefix reuse: resume from a cached prefix, run only the tokens that differ.

The tokens before a prompt's first slot are the same in every round, and often partly the same in every row. A model
runs them once, a `Snapshot` keeps what its KV cache then held, and later prompts continue on copies. What a template
says before its first field is the same in every batch, too (`recmas.engine.constant_prefixes`).

Prompts are left padded, so they all end in the same column. The cut is a column too: the last one before which the
snapshot knows every row's tokens. A row that could reuse more runs those few again, in place of the padding it would
have had there. So no padding ever stands between what is reused and what follows: full attention, sliding windows and
recurrent states see exactly the sequence of a prompt that was read in one piece.

Keys and values can be cut anywhere. A recurrent state cannot: it is kept where the agent's next prompt will be cut,
and serves that cut alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from recmas.engine.abilities import missing
from recmas.engine.cache_snapshot import Ids, Snapshot, common_columns, unsupported
from recmas.engine.constant_prefixes import LEAST_POSITIONS, ConstantPrefixes
from recmas.engine.continuation import Continuation, Past
from recmas.engine.messages import Prompt
from recmas.engine.prefill import Prefill, missing_padding, prefill_all, uncached


@dataclass
class Reading:
    """How prompts were read.

    Attributes:
        positions: of the prompts, without padding.
        computed: of them, those that ran through the model; the others were reused.
        reason: why nothing was reused, of the latest prompts of which that is true.
    """

    positions: int = 0
    computed: int = 0
    reason: str = ""

    def add(self, other: Reading) -> None:
        self.positions += other.positions
        self.computed += other.computed
        self.reason = other.reason or self.reason


class PrefixReuse:
    """The prefixes of one batch, kept for its later rounds: a snapshot per role, dropped with the batch.

    A snapshot goes as soon as no later visit can use it, and all go if memory runs out.

    Args:
        enabled: False reads every prompt in one piece.
        constants: what earlier batches read of prefixes that all prompts have; None keeps nothing beyond the batch.
        proved: the model need not prove its prefix reuse: this is the proof.

    Attributes:
        last: the reading of the latest prompts.
    """

    def __init__(
        self, enabled: bool = True, constants: ConstantPrefixes | None = None, *, proved: bool = False
    ) -> None:
        self._proved, self._constants = proved, constants
        self._off = "" if enabled else "prefix reuse is off"
        self._held: dict[str, Snapshot] = {}
        self.last = Reading()

    def select(self, rows: Sequence[int]) -> PrefixReuse:
        """For some rows of the batch, with what is held of them."""
        chosen = PrefixReuse(constants=self._constants, proved=self._proved)
        chosen._off = self._off
        chosen._held = {role: snapshot.select(rows) for role, snapshot in self._held.items()}
        return chosen

    def prefill(self, role: str, upcoming: Callable[[], Ids] | None, constant: Sequence[int] = ()) -> Prefill:
        """The `Prefill` of one visit.

        Args:
            role: whose snapshot it makes.
            upcoming: what will stand before the first slot of the prompts that the same model reads next, as far as
                that is known; None if it reads no more in this batch. Called for recurrent models only.
            constant: token ids that prompts of this visit begin with in any batch.
        """
        self.last = Reading()

        def prefill(decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None) -> tuple[Past, Tensor]:
            if not self._off:
                try:
                    return self._prefill(role, upcoming, constant, decoder, prompt, room, context)
                except torch.OutOfMemoryError:
                    if not (self._held or self._constants):
                        raise
                    self._held.clear()
                    if self._constants is not None:
                        self._constants.clear()
                    self._off = "memory ran out, so snapshots were dropped"
            positions = int(prompt.mask.sum())
            self.last = Reading(positions, positions, self._unproved(decoder, prompt) or self._off)
            return prefill_all(decoder, prompt, room, context)

        return prefill

    def _prefill(
        self,
        role: str,
        upcoming: Callable[[], Ids] | None,
        constant: Sequence[int],
        decoder: PreTrainedModel,
        prompt: Prompt,
        room: int,
        context: int | None,
    ) -> tuple[Past, Tensor]:
        past = Continuation(decoder, prompt.mask, room, context)
        prefix, pads = prompt.prefix, [int(count) for count in (prompt.mask == 0).sum(dim=1)]
        width = prompt.mask.shape[1]
        positions = computed = len(pads) * width - sum(pads)
        reason = "the prompt's tokens are not known" if prefix is None else unsupported(decoder, past.cache)
        reason = self._unproved(decoder, prompt) or reason
        constants = self._constants if len(constant) >= LEAST_POSITIONS else None
        if _recurrent(past) and any(pads):
            constants = None  # its state serves no row that has padding
        all_alike = 0 if prefix is None else _common(past, prefix, pads, width - 1)
        alone = upcoming is None and constants is None and not self._held and not _pays(all_alike, 0, pads)
        if not (reason or alone or self._proved):
            reason = missing(decoder, "prefix reuse")
        if reason or prefix is None:
            self.last = Reading(positions, computed, reason)
            return prefill_all(decoder, prompt, room, context)

        held = [kept for kept in self._held.values() if kept.decoder is decoder and kept.device == prompt.embeds.device]
        known = list(held)
        if constants is not None:
            made, read = constants.of(decoder, constant, prompt)
            known += [] if made is None else [made]
            computed += read
        cut, source = 0, None
        for snapshot in known:
            if (found := snapshot.cut(prefix, pads, width - 1)) > cut:
                cut, source = found, snapshot
        if _pays(all_alike, cut, pads):
            row = slice(pads.index(0), pads.index(0) + 1)
            mask = prompt.mask[row, :all_alike]
            if source is None:
                begun = Continuation(decoder, mask, 0)
            else:
                begun = source.select([row.start]).resume(mask, cut, [0], 0, None)
            begun.feed(prompt.embeds[row, cut:all_alike])
            computed += all_alike - cut
            cut, source = all_alike, Snapshot.of(begun, [prefix[row.start][:all_alike]], [0])
        if source is not None:
            past = source.resume(prompt.mask, cut, pads, room, context)
            computed -= sum(max(cut - pad, 0) for pad in pads)
        else:
            reason = "no earlier prompt can be continued" if held else "no earlier prompt is held"
        self.last = Reading(positions, computed, reason)

        recurrent = _recurrent(past)
        if upcoming is None:
            self._held = {name: kept for name, kept in self._held.items() if kept.decoder is not decoder}
        elif recurrent:
            split = common_columns(prefix, upcoming(), pads, width - 1)
            padded = max(pads) > past.length  # models do not mask it where they are fed a single column
            if split > past.length + padded:
                past.feed(prompt.embeds[:, past.length : split])
                ids = [row[: max(split - pad, 0)] for row, pad in zip(prefix, pads, strict=True)]
                self._held[role] = Snapshot.of(past, ids, pads)
        hidden = past.feed(prompt.embeds[:, past.length :])
        if upcoming is not None and not recurrent and (role not in self._held or self._held[role].ids != prefix):
            self._held[role] = Snapshot.of(past, prefix, pads)
        return past, hidden

    def _unproved(self, decoder: PreTrainedModel, prompt: Prompt) -> str:
        """What this prompt cannot be read with, and so has no prefix to reuse."""
        if self._proved:
            return ""
        slow = uncached(decoder) or missing_padding(decoder, prompt.mask)
        return slow or missing(decoder, "several positions")


def _common(past: Continuation, prefix: Ids, pads: list[int], last: int) -> int:
    """How many tokens, `last` at most, all rows begin alike with; 0 where a recurrent state could not be shared."""
    if _recurrent(past) and any(pads):
        return 0
    return common_columns(prefix, [prefix[0]] * len(prefix), [0] * len(prefix), last)


def _pays(columns: int, cut: int, pads: list[int]) -> bool:
    """Whether to read the columns from `cut` to `columns` once for all rows."""
    more = columns - cut
    return more > 0 and sum(max(columns - max(cut, pad), 0) for pad in pads) - more >= LEAST_POSITIONS


def _recurrent(past: Continuation) -> bool:
    return any(isinstance(layer, LinearAttentionLayer) for layer in past.cache.layers)
