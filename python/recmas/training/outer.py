"""Outer links: cross entropy of the answer, back through all rounds of the recursion.

The pattern's visits run as they run at inference, through the same prompts and the same handoffs, in one graph: an
agent that sends is forced to say its gold message of that round, and its latents R_in(h_1..h_m) are read off at the
positions that predict the message's first m tokens; the last agent's answer in the last round is the loss. Gradients
cross frozen agents and frozen inner links of every round; only outer links (and the weights of joint slots) learn.
Earlier rounds may count, too: with weights w the loss of r rounds is ``sum_k w_k CE_k``, CE_k that of a run of k.
`recmas.training.unroll` and `recmas.training.rollout` keep that graph small, and a batch is taken in micro-batches.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from recmas.agents.targets import target_tokens
from recmas.config.pattern import LinkKey
from recmas.config.system_json import edge_name
from recmas.engine.messages import Latents, run_link
from recmas.prompts.rows import Fields
from recmas.prompts.template import Slot
from recmas.system.system import System
from recmas.training.answer import answer_loss
from recmas.training.config import SAFE_RATE, OuterConfig, Source, each_round_count, weighed_rounds
from recmas.training.data import DataSource, RowSource, fixed_batches, pick, target_texts
from recmas.training.distillation import check_distill, count_latents, distill_loss, expert_of
from recmas.training.lengths import check_unrolled
from recmas.training.loop import OnStart, OnStep, TrainingResult, begins, check_run, train
from recmas.training.progress import Meter, Shown
from recmas.training.proofs import proved
from recmas.training.rollout import can_repeat, think
from recmas.training.round_norms import rounds_apart
from recmas.training.sharding import is_sharded
from recmas.training.teacher import check_trainable, force, named_parameters, only_trainable
from recmas.training.unroll import SharedPrefixes, recomputing

POSITIONS = {"cpu": 768}
"""Positions of prompts and texts that a micro-batch takes at once, by kind of device, ..."""
AT_ONCE = {"cpu": 384}
"""... those of them that a forward reads anew, and a layer that runs again holds: products gain little by more; ..."""
MOST_POSITIONS = 16384
"""... and both elsewhere."""


def outer_losses(
    system: System,
    rows: Sequence[Fields],
    rounds: int,
    *,
    latent_steps: int | Mapping[str, int] | None = None,
    latents: Source = "forced",
    recompute: bool = False,
    micro_batch: int | None = None,
    round_weights: Sequence[float] | None = None,
    distill: float = 0.0,
    meter: Meter | None = None,
) -> Iterator[torch.Tensor]:
    """`outer_loss` in parts that add up to it, one micro-batch of rows after the other.

    Each part is made when it is asked for: who goes back through it before asking for the next one holds the graph of
    one micro-batch only.

    Args:
        system, rows, rounds, latent_steps, latents, recompute, round_weights, distill: as for `outer_loss`.
        micro_batch: rows of a part; None takes as many as fill `POSITIONS`, and all where agents are sharded.
        meter: counts the tokens that are read.
    """
    steps, last = system.steps_by_role(latent_steps), system.pattern.last
    size = micro_batch or (len(rows) if is_sharded(system) else _fitting(system, rows, rounds, steps))
    weights = {}
    for round, weight in weighed_rounds(round_weights, rounds).items():
        answers = target_tokens(system.agents[last], target_texts(rows, last, round))
        weights[round] = weight / sum(map(len, answers))
    pairs = count_latents(system, rows, rounds, steps, latents) if distill > 0 else 0
    share = distill / pairs if pairs else 0.0
    for first in range(0, len(rows), size):
        yield _unrolled(system, rows[first : first + size], rounds, weights, share, steps, latents, recompute, meter)


def outer_loss(
    system: System,
    rows: Sequence[Fields],
    rounds: int,
    *,
    latent_steps: int | Mapping[str, int] | None = None,
    latents: Source = "forced",
    recompute: bool = False,
    round_weights: Sequence[float] | None = None,
    distill: float = 0.0,
) -> torch.Tensor:
    """Mean cross entropy (fp32 scalar) of the last agent's answer tokens, end included, after ``rounds`` rounds.

    With weights it is their sum over the rounds, each mean multiplied by its weight. What the last agent answers in a
    round that is not the last one follows its prompt of that round at once, as if that round were the last.

    Args:
        system: whose agents and links these are.
        rows: one batch.
        rounds: r.
        latent_steps: of every agent or by role; None takes the system's own.
        latents: where they come from, as in `OuterConfig`.
        recompute: run layers and rollouts again in the backward instead of keeping their activations.
        round_weights: of the rounds, the last one's at the end; None weighs that one alone.
        distill: weight of the loss of `recmas.training.distillation`, which is added.
    """
    (loss,) = outer_losses(
        system,
        rows,
        rounds,
        latent_steps=latent_steps,
        latents=latents,
        recompute=recompute,
        micro_batch=len(rows),
        round_weights=round_weights,
        distill=distill,
    )
    return loss


def _unrolled(
    system: System,
    rows: Sequence[Fields],
    rounds: int,
    weights: Mapping[int, float],
    distill: float,
    steps: Mapping[str, int],
    latents: Source,
    recompute: bool,
    meter: Meter | None,
) -> torch.Tensor:
    """Cross entropies of answers' tokens, each times its round's weight, and distances of latents times `distill`."""
    prefixes, losses, sharded = SharedPrefixes(), [], is_sharded(system)
    expert = expert_of(system) if distill else None
    taught: Latents | None = None
    for turn in system.walk(rows, rounds):
        visit, prompt = turn.visit, turn.prompt
        agent, count = system.agents[visit.role], steps[visit.role]
        begins = not sharded and proved(agent.decoder, "begun prefixes", prompt)
        answers = visit.role == system.pattern.last and visit.round in weights
        thinks = not visit.final and (latents == "rollout" or count == 0)
        if meter is not None:
            meter.add(prompt.mask.sum())
            meter.add(count * len(rows) if thinks else 0)
        if answers or not thinks:
            tokens = target_tokens(agent, target_texts(rows, visit.role, visit.round))
            if not answers:
                tokens = [row[:count] for row in tokens]
            begun = prefixes.of(visit.role, agent, prompt) if begins else None
            with recomputing(agent.decoder, enabled=recompute and proved(agent.decoder, "recompute")):
                at_once = None if sharded else _by_device(AT_ONCE, agent.device)
                speech = force(agent, prompt, tokens, begun=begun, at_once=at_once)
            if meter is not None:
                meter.add(speech.mask.sum())
        if answers:
            said = speech.mask.bool()
            losses.append(answer_loss(agent, speech.hidden[said], speech.ids[said]) * weights[visit.round])
        if visit.final:
            return torch.stack(losses).sum()
        link = system.inner_links[visit.role]
        if not thinks:
            turn.message = Latents(run_link(link, speech.hidden[:, :count]), speech.mask[:, :count].sum(dim=1).cpu())
        elif begins and recompute and count > 0 and prompt.embeds.requires_grad and can_repeat(agent, link):
            turn.message = think(agent, prompt, count, link, prefixes.of(visit.role, agent, prompt))
        else:
            turn.message = agent.think(prompt, count, link, weights_stay=not sharded)
        if visit.role == expert:
            taught = turn.message
        elif taught is not None and visit.role == system.pattern.last:
            losses.append(distill_loss(system, visit, taught, turn.message) * distill)
    raise AssertionError("the last visit of a pattern is final")


def _fitting(system: System, rows: Sequence[Fields], rounds: int, steps: Mapping[str, int]) -> int:
    """Rows of a micro-batch: as many as fill `POSITIONS`, the longest of them all."""
    longest = 1
    for visit in system.pattern.visits(min(rounds, 2)):
        for row in rows:
            parts = system.segments(visit, row)
            slots = sum(steps[sender] for part in parts if isinstance(part, Slot) for sender in part.senders)
            longest = max(longest, sum(len(part) for part in parts if not isinstance(part, Slot)) + slots)
    return max(1, min(_by_device(POSITIONS, agent.device) for agent in system.agents.values()) // longest)


def _by_device(positions: Mapping[str, int], device: torch.device) -> int:
    return positions.get(device.type, MOST_POSITIONS)


def trained_edges(system: System, config: OuterConfig, edges: Sequence[LinkKey] | None = None) -> list[LinkKey]:
    """Edges whose links `train_outer` trains: the given ones, or all that the rounds use and that latents pass.

    Raises:
        ValueError: links that the rounds need are missing, or a given edge has no link or passes no latents.
    """
    system.check_run(config.most_rounds)
    steps = system.steps_by_role(config.latent_steps)
    needed = system.outline.links_needed(config.most_rounds)
    passed = [edge for edge in system.outer_links if edge in needed and steps[edge[0]] > 0]
    if not passed:
        raise ValueError("latent_steps: 0 for every agent that sends: no latents, so no link could learn anything")
    chosen = passed if edges is None else list(edges)
    for edge in chosen:
        if edge not in needed:
            known = ", ".join(map(edge_name, sorted(needed)))
            raise ValueError(f"edges: {edge_name(edge)} is not used by {config.most_rounds} rounds, only {known}")
        if steps[edge[0]] == 0:
            raise ValueError(f"edges: {edge_name(edge)} passes no latents: {edge[0]!r} has 0 latent steps")
    return chosen


def train_outer(
    system: System,
    rows: RowSource,
    config: OuterConfig | None = None,
    *,
    edges: Sequence[LinkKey] | None = None,
    validation: RowSource | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Shown = True,
    trackers: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> TrainingResult:
    """Train outer links in place, all together; agents and inner links stay frozen.

    Args:
        system: whose agents and links these are; inner links trained and outer links warmed up before.
        rows: JSONL path, sequence of rows, or a callable ``batch index -> rows``; rows carry targets of every agent
            for every round that is unrolled (with ``latents="rollout"`` of the last agent alone, for the rounds that
            count).
        config: settings; None takes the defaults.
        edges: keys of outer links to train; None takes those that ``config.rounds`` rounds use and that latents
            pass: an agent of 0 latent steps sends none.
        validation: rows, not a callable, whose loss is measured now and then; a run that ends by itself leaves the
            links with the least.
        output: folder of the log and the checkpoints; None keeps none.
        resume: go on where the folder's checkpoint stopped.
        progress: show a bar where stderr is a terminal; "always" wherever it goes.
        trackers: names of trackers (`recmas.training.trackers`) that get every step's record.
        on_step: called after every step with its record; a true answer ends the run.
        on_start: called once, when everything has been checked and nothing has been written; a true answer
            ends it there.

    Raises:
        ValueError: links that the rounds need are missing, an edge without a link or without latents, or rows that lack
            fields or targets.
    """
    config = config or OuterConfig()
    chosen, steps = trained_edges(system, config, edges), system.steps_by_role(config.latent_steps)
    if config.most_rounds > 1 and config.learning_rate > SAFE_RATE:
        warnings.warn(
            f"learning_rate {config.learning_rate:g} through {config.most_rounds} rounds: more than {SAFE_RATE:g} tends"
            " to destroy the recursion",
            stacklevel=2,
        )
    check_distill(system, config)
    if is_sharded(system) and callable(rows) and config.micro_batch is not None:
        raise ValueError("micro_batch: batches of a callable may differ in size, and sharded agents need equal parts")
    source = DataSource(rows, config.batch_size, config.seed)
    needed_texts: dict[tuple[str, int], None] = {}
    for rounds in each_round_count(config.rounds):
        for visit in system.pattern.visits(rounds):
            if not visit.final and config.latents == "forced" and steps[visit.role] > 0:
                needed_texts[visit.role, visit.round] = None
        for round in weighed_rounds(config.round_weights, rounds):
            needed_texts[system.pattern.last, round] = None
    others = [] if validation is None else fixed_batches(validation, config.batch_size)
    checked = [source] if validation is None else [source, DataSource(validation, config.batch_size, config.seed)]
    for rows_of in checked:
        rows_of.check_targets(needed_texts)
        rows_of.check_fields(system, system.pattern.visits(config.most_rounds))
        check_unrolled(system, rows_of.rows, config)
    check_trainable(system)
    meter = Meter()

    losses = partial(
        outer_losses,
        system,
        latent_steps=config.latent_steps,
        latents=config.latents,
        recompute=config.recompute,
        micro_batch=config.micro_batch,
        round_weights=config.round_weights,
        distill=config.distill,
    )

    def loss(index: int, step: int) -> Iterator[torch.Tensor]:
        return losses(source.batch(index), pick(config.seed, step, config.rounds), meter=meter)

    def validate() -> float:
        """The mean over rows and the round counts that a step may draw."""
        counts, total = each_round_count(config.rounds), 0.0
        for rounds in counts:
            for batch in others:
                total += sum(part.item() for part in losses(batch, rounds)) * len(batch)
        return total / (len(counts) * sum(map(len, others)))

    parameters = named_parameters({edge_name(edge): system.outer_links[edge] for edge in chosen})
    for edge in chosen:
        if edge in system.edge_scores:
            parameters[f"{edge_name(edge)}.score"] = system.edge_scores[edge]
    folder = None if output is None else Path(output, "outer")
    check_run(parameters, config, folder, resume, validated=validation is not None, trackers=trackers)
    if not begins(on_start):
        return TrainingResult(0, [])
    with ExitStack() as stack:
        stack.enter_context(only_trainable(system, parameters))
        apart = stack.enter_context(rounds_apart(system, chosen, config.most_rounds)) if config.round_norms else None
        return train(
            parameters,
            loss,
            config,
            name="outer",
            output=folder,
            resume=resume,
            progress=progress,
            trackers=trackers,
            meter=meter,
            on_step=on_step,
            validate=validate if others else None,
            validated_by_all=is_sharded(system),
            round_norms=apart,
        )
