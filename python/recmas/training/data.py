"""Training rows and the batches made of them.

A row is a JSON object: the fields that the agents' templates name, and what each agent should say::

    {"question": "2 bako", "planner_sheet": "...",
     "targets": {"planner": "1 red", "critic": ["1 cat", "0 cat"], "solver": ["1 dilo", "0 dilo"]}}

A target is one text, said in every round, or one text per round.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Union

import torch

from recmas.agents.agent import Agent
from recmas.config.pattern import Visit
from recmas.prompts.jsonl import read_rows
from recmas.prompts.rows import Fields
from recmas.system.system import System

RowSource = Union[str, "os.PathLike[str]", Sequence[Fields], Callable[[int], Sequence[Fields]]]


class DataSource:
    """Batches of rows as a pure function of ``(seed, index)``, so that a run resumes exactly where it stopped.

    ``rows`` is a JSONL path, a sequence of rows (shuffled anew in every epoch) or a callable ``index -> rows`` that
    makes the batch itself (generated worlds; it decides the batch's size and must return the same rows for the same
    index).
    """

    def __init__(self, rows: RowSource, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._make: Callable[[int], Sequence[Fields]]
        self._rows: Sequence[Fields] = ()
        if callable(rows):
            self._make = rows
            return
        self._rows = read_rows(rows) if isinstance(rows, str | os.PathLike) else rows
        if not self._rows:
            raise ValueError("rows: expected at least one row, got an empty sequence")
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._make = self._shuffled

    def check_targets(self, needed: Iterable[tuple[str, int]]) -> None:
        """Look at all rows, so that one without a text ends no run halfway; those of a callable are not known yet.

        Args:
            needed: (role, round) of the texts that every row must have.

        Raises:
            ValueError: a row lacks one, as `target_texts` says it; its number counts from 0 over all rows.
        """
        for role, round in needed:
            target_texts(self._rows, role, round)

    def check_fields(self, system: System, visits: Iterable[Visit]) -> None:
        """Raise ValueError, as `System.check_fields`, if a row lacks a field that a prompt of these visits names."""
        system.check_fields(self._rows, visits)

    def batch(self, index: int) -> list[Fields]:
        """The rows of batch ``index`` (from 0)."""
        rows = list(self._make(index))
        if not rows:
            raise ValueError(f"rows: the callable returned no rows for batch {index}")
        return rows

    def _shuffled(self, index: int) -> list[Fields]:
        first = index * self._batch_size
        return [self._rows[self._position(i)] for i in range(first, first + self._batch_size)]

    def _position(self, i: int) -> int:
        epoch, offset = divmod(i, len(self._rows))
        if self._order[0] != epoch:
            order = list(range(len(self._rows)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


def pick(seed: int, step: int, choices: int | Sequence[int]) -> int:
    """One of ``choices`` for this step, a pure function of ``(seed, step)``; an int stands for itself."""
    return choices if isinstance(choices, int) else random.Random(f"{seed}:{step}").choice(list(choices))


def target_texts(rows: Sequence[Fields], role: str, round: int) -> list[str]:
    """What agent ``role`` should say in ``round`` (from 1), one text per row.

    Raises:
        ValueError: a row has no text for this agent and round; names the row, the agent and what was found.
    """
    return [_target_text(row, index, role, round) for index, row in enumerate(rows)]


def _target_text(row: Fields, index: int, role: str, round: int) -> str:
    targets = row.get("targets")
    if not isinstance(targets, Mapping):
        raise ValueError(f"row {index}: expected 'targets' to be an object of texts by agent, got {targets!r}")
    if role not in targets:
        raise ValueError(f"row {index}: targets has no text for agent {role!r}, only for {sorted(targets)}")
    text = targets[role]
    if isinstance(text, Sequence) and not isinstance(text, str):
        if round > len(text):
            raise ValueError(f"row {index}: targets of {role!r} cover {len(text)} rounds, round {round} is needed")
        text = text[round - 1]
    if not isinstance(text, str):
        raise ValueError(f"row {index}: expected the target of agent {role!r} to be text, got {text!r}")
    return text


def target_batch(
    agent: Agent, texts: Sequence[str], *, max_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 [batch, length], right padded, on the agent's device.

    Each text is tokenised without special tokens and ends with the end-of-sequence token; ``max_tokens`` keeps the
    first tokens only. Padding repeats the end-of-sequence token and is masked.
    """
    if not texts:
        raise ValueError("texts: expected at least one text")
    end = end_token(agent)
    encoded = agent.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    tokens = [[*ids, end][:max_tokens] for ids in encoded]
    length = max(len(ids) for ids in tokens)
    ids = torch.tensor([row + [end] * (length - len(row)) for row in tokens], device=agent.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens], device=agent.device)
    return ids, mask


def end_token(agent: Agent) -> int:
    """The token that ends an agent's message: its tokenizer's end-of-sequence token, else its model's first one."""
    if agent.tokenizer.eos_token_id is not None:
        return int(agent.tokenizer.eos_token_id)
    for token in agent.eos_ids:
        return int(token)
    raise ValueError(f"agent {agent.name!r}: neither its tokenizer nor its model names an end-of-sequence token")
