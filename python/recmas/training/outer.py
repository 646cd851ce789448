"""Outer links: cross entropy of the answer, back through all rounds of the recursion.

The pattern's visits run as they run at inference, through the same prompts and the same handoffs, in one graph: an
agent that sends is forced to say its gold message of that round, and its latents R_in(h_1..h_m) are read off at the
positions that predict the message's first m tokens; the last agent's answer in the last round is the loss. Gradients
cross frozen agents and frozen inner links of every round; only outer links (and the weights of joint slots) learn.
`recmas.training.unroll` keeps that graph small.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from recmas.agents.agent import Agent
from recmas.config.pattern import Edge
from recmas.config.system_json import edge_name
from recmas.engine.messages import Latents, run_link
from recmas.prompts.rows import Fields
from recmas.system.system import System
from recmas.training.config import SAFE_RATE, OuterConfig, Source, each_round_count
from recmas.training.data import DataSource, RowSource, pick, target_texts, target_tokens
from recmas.training.loop import OnStep, TrainingResult, train
from recmas.training.teacher import Speech, force, named_parameters, only_trainable
from recmas.training.unroll import SharedPrefixes, recomputing

LOGITS = 1 << 25  # 128 MiB of float32


def outer_loss(
    system: System,
    rows: Sequence[Fields],
    rounds: int,
    *,
    latent_steps: int | Mapping[str, int] | None = None,
    latents: Source = "forced",
    recompute: bool = False,
) -> torch.Tensor:
    """Mean cross entropy (fp32 scalar) of the last agent's answer tokens, end included, after ``rounds`` rounds.

    Args:
        system: whose agents and links these are.
        rows: one batch.
        rounds: r.
        latent_steps: of every agent or by role; None takes the system's own.
        latents: where they come from, as in `OuterConfig`.
        recompute: run the layers again in the backward instead of keeping their activations; the same bits.
    """
    steps = system.steps_by_role(latent_steps)
    prefixes = SharedPrefixes()
    for turn in system.walk(rows, rounds):
        visit, prompt = turn.visit, turn.prompt
        agent, count = system.agents[visit.role], steps[visit.role]
        if not visit.final and (latents == "rollout" or count == 0):
            turn.message = agent.think(prompt, count, system.inner_links[visit.role])
            continue
        tokens = target_tokens(agent, target_texts(rows, visit.role, visit.round))
        if not visit.final:
            tokens = [row[:count] for row in tokens]
        begun = prefixes.of(visit.role, agent, prompt)
        with recomputing(agent.decoder, enabled=recompute):
            speech = force(agent, prompt, tokens, begun=begun)
        if visit.final:
            return answer_loss(agent, speech)
        states = run_link(system.inner_links[visit.role], speech.hidden)
        turn.message = Latents(states, speech.mask.sum(dim=1).cpu())
    raise AssertionError("the last visit of a pattern is final")


def answer_loss(agent: Agent, speech: Speech) -> torch.Tensor:
    """Mean cross entropy of what was said; the LM head sees the positions that predict it and no others.

    Logits of more than `LOGITS` entries are made in parts, each once more in the backward, and never held together.
    """
    said = speech.mask.bool()
    hidden, ids = speech.hidden[said], speech.ids[said]
    rows = max(1, LOGITS // agent.model.get_output_embeddings().weight.shape[0])
    if len(ids) <= rows:
        return _cross_entropy(agent, hidden, ids) / len(ids)
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    losses = [checkpoint(_cross_entropy, agent, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum() / len(ids)


def _cross_entropy(agent: Agent, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum over rows ``hidden [N, d]`` and the token each should predict."""
    logits = agent.logits(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="sum")


def train_outer(
    system: System,
    rows: RowSource,
    config: OuterConfig | None = None,
    *,
    edges: Sequence[Edge] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train outer links in place, all together; agents and inner links stay frozen.

    Args:
        system: whose agents and links these are; inner links trained and outer links warmed up before.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry targets of every agent
            for every round that is unrolled (of the last agent alone with ``latents="rollout"``).
        config: settings; None takes the defaults.
        edges: (source, target) pairs to train; None takes those that ``config.rounds`` rounds use.
        output: folder of the log and the checkpoints; None keeps none.
        resume: go on where the folder's checkpoint stopped.
        progress: show a bar.
        on_step: called after every step with its record; a true answer ends the run.

    Raises:
        ValueError: links that the rounds need are missing, an edge without a link, or rows that lack fields or targets.
    """
    config = config or OuterConfig()
    system.check_run(config.most_rounds)
    steps = system.steps_by_role(config.latent_steps)
    needed = system.pattern.edges(config.most_rounds)
    chosen = [edge for edge in system.outer_links if edge in needed] if edges is None else [(a, b) for a, b in edges]
    for edge in chosen:
        if edge not in needed:
            known = ", ".join(map(edge_name, sorted(needed)))
            raise ValueError(f"edges: {edge_name(edge)} is not used by {config.most_rounds} rounds, only {known}")
    if config.most_rounds > 1 and config.learning_rate > SAFE_RATE:
        warnings.warn(
            f"learning_rate {config.learning_rate:g} through {config.most_rounds} rounds: more than {SAFE_RATE:g} tends"
            " to destroy the recursion",
            stacklevel=2,
        )
    source = DataSource(rows, config.batch_size, config.seed)
    visits = (visit for rounds in each_round_count(config.rounds) for visit in system.pattern.visits(rounds))
    forced = (visit for visit in visits if visit.final or (config.latents == "forced" and steps[visit.role] > 0))
    source.check_targets(dict.fromkeys((visit.role, visit.round) for visit in forced))

    def loss(index: int, step: int) -> torch.Tensor:
        rounds = pick(config.seed, step, config.rounds)
        batch = source.batch(index)
        return outer_loss(
            system,
            batch,
            rounds,
            latent_steps=config.latent_steps,
            latents=config.latents,
            recompute=config.recompute,
        )

    parameters = named_parameters({edge_name(edge): system.outer_links[edge] for edge in chosen})
    for edge in chosen:
        if edge in system.edge_scores:
            parameters[f"{edge_name(edge)}.score"] = system.edge_scores[edge]
    with only_trainable(system, parameters):
        return train(
            parameters,
            loss,
            config,
            name="outer",
            output=None if output is None else os.path.join(output, "outer"),
            resume=resume,
            progress=progress,
            on_step=on_step,
        )
