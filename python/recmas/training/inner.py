"""Inner links: R_in turns an agent's hidden state into the input embedding of the token it was about to say.

Per agent, over the tokens x of its own message (arXiv 2604.25917, inner loop), h_t the state that predicts x_t:

    mean_t  cosine_weight (1 - cos(R_in(h_t), E(x_t))) + mse_weight mean((R_in(h_t) - E(x_t))^2)

E is the agent's input embedding, scaled where the model scales it. The prompt holds the gold messages of the agent's
senders as text, so agents need nothing of each other and each one is trained by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from recmas.engine.messages import run_link
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.alignment import Cache, Stage, train_apart
from recmas.training.config import InnerConfig
from recmas.training.data import RowSource
from recmas.training.loop import OnStart, OnStep, TrainingResult
from recmas.training.pairs import Pairs, speak, utterances
from recmas_kernels import alignment_loss


def inner_loss(
    system: System,
    role: str,
    rows: Sequence[Fields],
    round: int = 1,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 0.0,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """The loss above over a batch of rows, a scalar; only the agent's inner link receives a gradient."""
    said = utterances(system, role, rows, round, max_tokens=max_tokens)
    pairs = speak(system.agents[role], said)
    return inner_alignment(system, role, pairs, cosine_weight=cosine_weight, mse_weight=mse_weight)


def inner_alignment(
    system: System, role: str, pairs: Pairs, *, cosine_weight: float = 1.0, mse_weight: float = 0.0
) -> torch.Tensor:
    """The loss above over pairs of the agent, a scalar."""
    agent = system.agents[role]
    return alignment_loss(
        run_link(system.inner_links[role], pairs.hidden.to(agent.device)),
        agent.model.get_input_embeddings().weight,
        token_ids=pairs.ids.to(agent.device),
        cosine_weight=cosine_weight,
        mse_weight=mse_weight,
        embed_scale=agent.embed_scale,
    )


def _examples(system: System, role: str, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    agent = system.agents[role]
    return pairs.hidden.to(agent.device), agent.embed(pairs.ids.to(agent.device)[None])[0]


def train_inner(
    system: System,
    rows: RowSource,
    config: InnerConfig | None = None,
    *,
    roles: Sequence[str] | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    cache: Cache | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> dict[str, TrainingResult]:
    """Train inner links in place, one agent after the other; everything else stays frozen.

    Args:
        system: whose agents and links these are.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry targets, or any text
            (`recmas.training.data`).
        config: settings; None takes the defaults.
        roles: agents to train; None takes every agent that has an inner link.
        validation: rows, not a callable, whose loss is measured now and then; a run that ends by itself leaves the
            links with the least.
        output: folder of logs and checkpoints, one folder ``inner-<role>`` each; None keeps none.
        cache: `PairCache`, or its folder: every text runs through its agent once, and the losses are those of the run
            without, up to rounding; None runs the agent anew for every batch.
        resume: go on where the folder's checkpoints stopped.
        progress: show a bar per agent.
        on_step: called after every step with its record; a true answer ends that agent's run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Returns:
        What each agent's run did.

    Raises:
        ValueError: an unknown role, one without an inner link, or rows that lack fields or targets.
    """
    chosen = list(system.inner_links) if roles is None else list(roles)
    for role in chosen:
        if role not in system.inner_links:
            known = ", ".join(system.inner_links) or "nobody"
            raise ValueError(f"roles: {role!r} has no inner link, only {known}")
    return train_apart(
        system,
        {role: system.inner_links[role] for role in chosen},
        Stage("inner", inner_alignment, _examples),
        rows,
        config or InnerConfig(),
        validation=validation,
        output=output,
        cache=cache,
        resume=resume,
        progress=progress,
        on_step=on_step,
        on_start=on_start,
    )
