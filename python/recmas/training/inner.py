"""Inner links: R_in turns an agent's hidden state into the input embedding of the token it was about to say.

Per agent, over the tokens x of its own message (arXiv 2604.25917, inner loop), h_t the state that predicts x_t:

    mean_t  cosine_weight (1 - cos(R_in(h_t), E(x_t))) + mse_weight mean((R_in(h_t) - E(x_t))^2)

E is the agent's input embedding, scaled where the model scales it. With another agent's embeddings as targets (the
summaries of the paper describe the stage so), E(x_t) is the mean of that agent's over its tokens that share a character
with x_t, as in the warm-up, and tokens without one do not count. The prompt holds the gold messages of the agent's
senders as text, so agents need nothing of each other and each one is trained by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from recmas.engine.messages import run_link
from recmas.prompts.jsonl import read_rows
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.alignment import Cache, Stage, train_apart
from recmas.training.config import InnerConfig
from recmas.training.counterparts import Counterparts, check_alignable, check_offsets
from recmas.training.data import RowSource
from recmas.training.loop import OnStart, OnStep
from recmas.training.pairs import Pairs, speak, utterances
from recmas.training.progress import Shown
from recmas.training.step_log import TrainingResult
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
    target: str | None = None,
) -> torch.Tensor:
    """The loss above over a batch of rows, a scalar; only the agent's inner link receives a gradient.

    ``target`` is the agent whose embeddings are aimed at; None, and the role itself, is its own.
    """
    said = utterances(system, role, rows, round, max_tokens=max_tokens)
    pairs = speak(system.agents[role], said)
    aims = _aims(system, {role: role if target is None else target})
    return inner_alignment(aims, system, role, pairs, cosine_weight=cosine_weight, mse_weight=mse_weight)


def inner_alignment(
    aims: Mapping[str, Counterparts],
    system: System,
    role: str,
    pairs: Pairs,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 0.0,
) -> torch.Tensor:
    """The loss above over pairs of the agent, a scalar; ``aims`` has what agents aim at that have others' targets."""
    agent, link = system.agents[role], system.inner_links[role]
    if role in aims:
        hidden, target = _examples(aims, system, role, pairs)
        return alignment_loss(run_link(link, hidden), target, cosine_weight=cosine_weight, mse_weight=mse_weight)
    return alignment_loss(
        run_link(link, pairs.hidden.to(agent.device)),
        agent.model.get_input_embeddings().weight,
        token_ids=pairs.ids.to(agent.device),
        cosine_weight=cosine_weight,
        mse_weight=mse_weight,
        embed_scale=agent.embed_scale,
    )


def _examples(
    aims: Mapping[str, Counterparts], system: System, role: str, pairs: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    agent = system.agents[role]
    if role not in aims:
        return pairs.hidden.to(agent.device), agent.embed(pairs.ids.to(agent.device)[None])[0]
    target, found = aims[role].embeddings(pairs.texts, pairs.lengths)
    return pairs.hidden[found.to(pairs.hidden.device)].to(agent.device), target.to(agent.device)


def _targets(inner_target: str | Mapping[str, str] | None, roles: Sequence[str]) -> dict[str, str]:
    """By role, the agent whose embeddings its link aims at."""
    if not isinstance(inner_target, Mapping):
        return {role: inner_target or role for role in roles}
    for role in inner_target:
        if role not in roles:
            raise ValueError(f"inner_target: no inner link of {role!r} is trained, only of {', '.join(roles)}")
    return {role: inner_target.get(role, role) for role in roles}


def _aims(system: System, targets: Mapping[str, str]) -> dict[str, Counterparts]:
    """What agents aim at that have another one's embeddings as targets."""
    aims = {}
    for role, target in targets.items():
        if target not in system.agents:
            raise ValueError(f"inner_target: unknown role {target!r}; the pattern has {', '.join(system.agents)}")
        if target == role:
            continue
        widths = system.agents[role].hidden_size, system.agents[target].hidden_size
        if widths[0] != widths[1]:
            raise ValueError(
                f"inner_target: the inner link of {role!r} makes {widths[0]} features, embeddings of {target!r} have "
                f"{widths[1]}"
            )
        for one in (role, target):
            check_offsets(system.agents[one].tokenizer)
        aims[role] = Counterparts(system.agents[role], system.agents[target])
    return aims


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
    progress: Shown = True,
    trackers: Sequence[str] = (),
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
        progress: show a bar per agent where stderr is a terminal; "always" wherever it goes.
        trackers: names of trackers (`recmas.training.trackers`) that get every step's record.
        on_step: called after every step with its record; a true answer ends that agent's run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Returns:
        What each agent's run did.

    Raises:
        ValueError: an unknown role, one without an inner link, a target of another width, or rows that lack fields or
            targets.
        FloatingPointError: the loss of some roles was not finite; the other roles' links were trained to their ends.
    """
    chosen = list(system.inner_links) if roles is None else list(roles)
    for role in chosen:
        if role not in system.inner_links:
            known = ", ".join(system.inner_links) or "nobody"
            raise ValueError(f"roles: {role!r} has no inner link, only {known}")
    config = config or InnerConfig()
    targets = _targets(config.inner_target, chosen)
    aims = _aims(system, targets)
    if isinstance(rows, str | os.PathLike):
        rows = read_rows(rows)
    if not callable(rows):
        for role in aims:
            check_alignable(system, role, targets[role], f"the inner link of {role!r}", rows, config)
    return train_apart(
        system,
        {role: system.inner_links[role] for role in chosen},
        Stage("inner", partial(inner_alignment, aims), partial(_examples, aims)),
        rows,
        config,
        validation=validation,
        output=output,
        cache=cache,
        resume=resume,
        progress=progress,
        trackers=trackers,
        on_step=on_step,
        on_start=on_start,
    )
