"""The loss of the outer links: cross entropy of the answer, back through all rounds of the recursion.

The pattern's visits run as they run at inference, through the same prompts and the same handoffs, in one graph: an
agent that sends is forced to say its gold message of that round, and its latents R_in(h_1..h_m) are read off at the
positions that predict the message's first m tokens; the last agent's answer in the last round is the loss. Gradients
cross frozen agents and frozen inner links of every round; only outer links (and the weights of joint slots) learn.
Earlier rounds may count, too: with weights w the loss of r rounds is ``sum_k w_k CE_k``, CE_k that of a run of k.
`recmas.training.unroll` and `recmas.training.rollout` keep that graph small, and a batch is taken in micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from recmas.agents.targets import target_tokens
from recmas.engine.messages import Latents, run_link
from recmas.prompts.rows import Fields
from recmas.prompts.template import Slot
from recmas.system.system import System
from recmas.training.answer import answer_loss
from recmas.training.config import Source, weighed_rounds
from recmas.training.data import target_texts
from recmas.training.distillation import count_latents, distill_loss, expert_of
from recmas.training.progress import Meter
from recmas.training.proofs import proved
from recmas.training.rollout import can_repeat, think
from recmas.training.sharding import is_sharded
from recmas.training.teacher import force
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
