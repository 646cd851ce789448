"""Teacher forcing, shared by all stages: what the agents say is given, and what they think while saying it is read off.

The hidden state that matters is always the one that PREDICTS a token: the last prompt position for a message's first
token. That is also where a rollout's latents come from, h_1 being the state of the last prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from recmas.agents.agent import Agent
from recmas.agents.targets import target_batch
from recmas.engine.messages import Prompt
from recmas.system.system import System
from recmas.training.unroll import rows_of


class Speech(NamedTuple):
    """An agent's forced message: ``hidden`` [batch, length, d] predicts ``ids`` [batch, length] where ``mask`` is 1."""

    hidden: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor


def force(
    agent: Agent,
    prompt: Prompt,
    tokens: Sequence[Sequence[int]],
    *,
    begun: DynamicCache | None = None,
    at_once: int | None = None,
) -> Speech:
    """A forward of prompt and given tokens.

    Args:
        agent: speaks.
        prompt: the batch of prompts.
        tokens: ids that each row says.
        begun: holds the prompt's first columns already, as `Agent.hidden` takes it.
        at_once: most positions of a forward, which takes a row at least; None runs all rows in one.
    """
    ids, mask = target_batch(agent, tokens)
    count, length = ids.shape
    read = prompt.mask.shape[1] - (0 if begun is None else begun.get_seq_length()) + length - 1
    size = count if at_once is None else max(1, at_once // read)
    if size >= count:
        return Speech(agent.hidden(prompt, ids, mask, begun), ids, mask)
    parts = []
    for first in range(0, count, size):
        rows = slice(first, first + size)
        cache = None if begun is None else rows_of(begun, rows)
        parts.append(agent.hidden(Prompt(prompt.embeds[rows], prompt.mask[rows]), ids[rows], mask[rows], cache))
    return Speech(torch.cat(parts), ids, mask)


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters of the modules as ``<name of the module>.<name of the parameter>``."""
    return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}


def check_trainable(system: System) -> None:
    """Raise ValueError for a system whose weights do not stay where they are."""
    if system.offloader is not None:
        raise ValueError(
            "offload: a system whose weights are on devices for visits only cannot be trained; load it without"
        )


@contextmanager
def only_trainable(system: System, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within, of all parameters of the system exactly these require grad; afterwards each flag is what it was.

    The weights of links that do not learn are read as they stand: packed, a step took as long and 5 % more memory.
    """
    check_trainable(system)
    modules: list[nn.Module] = [agent.model for agent in system.agents.values()]
    modules += [*system.inner_links.values(), *system.outer_links.values()]
    everything = [p for module in modules for p in module.parameters()] + list(system.edge_scores.values())
    flags = {p: p.requires_grad for p in everything}
    trained = set(parameters.values())
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in trained)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
