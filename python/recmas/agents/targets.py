"""Token ids of what an agent is made to say, for teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recmas.agents.agent import Agent
from recmas.prompts.vocabulary import check_ids


def target_tokens(agent: Agent, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text: tokenised without special tokens, and the end-of-sequence token."""
    if not texts:
        raise ValueError("texts: expected at least one text")
    end = end_token(agent)
    rows = [[*ids, end] for ids in agent.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    for row in rows:
        check_ids(row, agent.vocabulary, agent.tokenizer, f"agent {agent.name!r}")
    return rows


def target_batch(agent: Agent, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 ``[batch, length]``, right padded, on the agent's device.

    Padding repeats the end-of-sequence token and is masked.
    """
    end, length = end_token(agent), max(map(len, tokens))
    ids = [[*row, *[end] * (length - len(row))] for row in tokens]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in tokens]
    ids_and_mask = torch.tensor([ids, mask], dtype=torch.long, device=agent.device)
    return ids_and_mask[0], ids_and_mask[1]


def end_token(agent: Agent) -> int:
    """The token that ends an agent's message: its tokenizer's end-of-sequence token, else the least of its model's."""
    if agent.tokenizer.eos_token_id is not None:
        return int(agent.tokenizer.eos_token_id)
    if agent.eos_ids:
        return min(agent.eos_ids)
    raise ValueError(f"agent {agent.name!r}: neither its tokenizer nor its model names an end-of-sequence token")
