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
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from recmas.engine.abilities import missing
from recmas.engine.cache_snapshot import Ids, Snapshot, common_columns, unsupported
from recmas.engine.constant_prefixes import LEAST_POSITIONS, ConstantPrefixes
from recmas.engine.continuation import Continuation, Past
from recmas.engine.known_beginning import KnownBeginning
from recmas.engine.messages import Prompt
from recmas.engine.model_state import ModelState, ModelStates
from recmas.engine.padded_rows import PaddedRows
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


class _Visit(NamedTuple):
    """As `PrefixReuse.prefill` takes it."""

    role: str
    upcoming: Callable[[], Ids] | None
    constant: Sequence[int]


class PrefixReuse:
    """The prefixes of one batch, kept for its later rounds: a snapshot per role, dropped with the batch.

    A snapshot goes as soon as no later visit can use it, or its model has changed (`ModelState` says which changes are
    seen), and all go if memory runs out.

    Args:
        enabled: False reads every prompt in one piece.
        constants: what earlier batches read of prefixes that all prompts have; None keeps nothing beyond the batch.
        states: what models computed with when last looked at, where `constants` do not know; None begins anew.
        proved: the model need not prove its prefix reuse: this is the proof.

    Attributes:
        last: the reading of the latest prompts.
    """

    def __init__(
        self,
        enabled: bool = True,
        constants: ConstantPrefixes | None = None,
        states: ModelStates | None = None,
        *,
        proved: bool = False,
    ) -> None:
        self._proved, self._constants = proved, constants
        self._off = "" if enabled else "prefix reuse is off"
        self._states = constants.states if constants is not None else states or ModelStates()
        self._held: dict[str, Snapshot] = {}
        self.last = Reading()

    def select(self, rows: Sequence[int]) -> PrefixReuse:
        """For some rows of the batch, with what is held of them."""
        chosen = PrefixReuse(constants=self._constants, states=self._states, proved=self._proved)
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
        visit = _Visit(role, upcoming, constant)

        def prefill(decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None) -> tuple[Past, Tensor]:
            if not self._off:
                try:
                    return self._prefill(visit, decoder, prompt, room, context)
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
        self, visit: _Visit, decoder: PreTrainedModel, prompt: Prompt, room: int, context: int | None
    ) -> tuple[Past, Tensor]:
        past, rows = Continuation(decoder, prompt.mask, room, context), PaddedRows.of(prompt)
        shareable = not (_recurrent(past) and any(rows.pads))  # one row's state serves none that has padding
        alike = rows.alike() if shareable else 0
        constants = self._constants if shareable and len(visit.constant) >= LEAST_POSITIONS else None
        alone = visit.upcoming is None and constants is None and not self._held and not rows.pays(alike, 0)
        reason = "the prompt's tokens are not known" if prompt.prefix is None else unsupported(decoder, past.cache)
        reason = self._unproved(decoder, prompt) or reason
        if not (reason or alone or self._proved):
            reason = missing(decoder, "prefix reuse")
        self.last = Reading(rows.positions, rows.positions, reason)
        if reason:
            return prefill_all(decoder, prompt, room, context)
        if alone:
            self.last.reason = "no earlier prompt is held"
            return past, past.feed(prompt.embeds)

        state = self._states.of(decoder)
        if state.unforeseen:
            self.last.reason = state.unforeseen
            return prefill_all(decoder, prompt, room, context)
        known = KnownBeginning(decoder, state, prompt, rows)
        self.last.reason = self._offer(known, state, prompt.embeds.device)
        if constants is not None:
            kept, read = constants.of(decoder, state, visit.constant, prompt)
            self.last.computed += read
            if kept is not None:
                known.offer(kept)
        known.read_on(alike)
        self.last.computed += known.computed
        if (resumed := known.resume(room, context)) is not None:
            past = resumed
            self.last.computed -= rows.before(past.length)
            self.last.reason = ""
        return past, self._feed(past, visit, state, prompt, rows)

    def _offer(self, known: KnownBeginning, state: ModelState, device: torch.device) -> str:
        """Offer what is held of a model; why there may be nothing to continue."""
        of_it = {role: kept for role, kept in self._held.items() if kept.decoder is state.model}
        stale = [role for role, kept in of_it.items() if kept.state is not state]
        for role in stale:
            del self._held[role], of_it[role]
        here = [kept for kept in of_it.values() if kept.device == device]
        for kept in here:
            known.offer(kept)
        if here:
            return "no earlier prompt can be continued"
        return "the model is no longer as it was" if stale else "no earlier prompt is held"

    def _feed(self, past: Continuation, visit: _Visit, state: ModelState, prompt: Prompt, rows: PaddedRows) -> Tensor:
        """Read what is left of the prompts and keep what later ones need; the final-norm hidden state ``[B, d]``."""
        recurrent = _recurrent(past)
        if visit.upcoming is None:
            self._held = {role: kept for role, kept in self._held.items() if kept.decoder is not past.decoder}
        elif recurrent:
            split = common_columns(rows.ids, visit.upcoming(), rows.pads, rows.last)
            padded = max(rows.pads) > past.length  # models do not mask it where they are fed a single column
            if split > past.length + padded:
                past.feed(prompt.embeds[:, past.length : split])
                ids = [row[: max(split - pad, 0)] for row, pad in zip(rows.ids, rows.pads, strict=True)]
                self._held[visit.role] = Snapshot.of(past, state, ids, rows.pads)
        hidden = past.feed(prompt.embeds[:, past.length :])
        held = self._held.get(visit.role)
        if visit.upcoming is not None and not recurrent and (held is None or held.ids != rows.ids):
            self._held[visit.role] = Snapshot.of(past, state, rows.ids, rows.pads)
        return hidden

    def _unproved(self, decoder: PreTrainedModel, prompt: Prompt) -> str:
        """What this prompt cannot be read with, and so has no prefix to reuse."""
        if self._proved:
            return ""
        slow = uncached(decoder) or missing_padding(decoder, prompt.mask)
        return slow or missing(decoder, "several positions")


def _recurrent(past: Continuation) -> bool:
    return any(isinstance(layer, LinearAttentionLayer) for layer in past.cache.layers)
