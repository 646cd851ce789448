"""One batch of rows on its way through a system: an agent thinks or writes at every turn of the walk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from recmas.agents.detokenizer import Detokenizer, text_of
from recmas.agents.model import PromptTooLongError
from recmas.answering.answers import Answers, Handoff
from recmas.answering.plan import Plan
from recmas.config.pattern import Visit
from recmas.devices.failure import named
from recmas.engine.messages import Latents, Message
from recmas.engine.prefill import Prefill
from recmas.engine.prefix_reuse import PrefixReuse, Reading
from recmas.prompts.rows import Fields
from recmas.system.system import Turn
from recmas.tools import Caller


class Batch:
    """Some of a run's rows.

    Args:
        plan: the run.
        answers: of these rows, to be filled, in the order of their numbers.
        fields: of all rows.
        numbers: of the rows in this batch.
    """

    def __init__(self, plan: Plan, answers: Answers, fields: Sequence[Fields], numbers: Sequence[int]) -> None:
        self.plan, self.system, self.numbers = plan, plan.system, numbers
        self.visits = list(plan.system.pattern.visits(plan.rounds))
        self.prefix_reuse = PrefixReuse(plan.options.prefix_reuse)
        self.rows = [fields[number] for number in numbers]
        self.answers = answers
        self.started, self.visited = 0.0, 0

    @torch.no_grad()
    def run(self, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """Fill in the answers; yields the number of a row and a piece of its text as it is written, if asked to."""
        self.started = time.perf_counter()
        try:
            for turn in self.system.walk(self.rows, self.plan.rounds):
                with named(f"agent {turn.visit.role!r}", turn.prompt.embeds.device):
                    try:
                        if turn.visit.final:
                            yield from self.write_answers(turn, in_pieces)
                        else:
                            self.send(turn)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"round {turn.visit.round}: {error}") from None
                    self.account(turn)
        except PromptTooLongError as error:
            raise ValueError(f"row {self.numbers[error.row]}: {error}") from error

    def send(self, turn: Turn) -> None:
        """The turn of an agent whose message another one reads."""
        message = self.think(turn) if self.plan.options.mode == "latent" else self.write(turn)
        if self.plan.on_message is not None:
            message = self.plan.on_message(turn.visit, message)
        if self.plan.options.trace:
            self.record(turn.visit, message)
        turn.message = message

    def think(self, turn: Turn) -> Latents:
        role = turn.visit.role
        agent, link, steps = self.system.agents[role], self.system.inner_links[role], self.plan.latent_steps[role]
        latents = agent.think(turn.prompt, steps, link, **self.running(turn.visit))
        if not (finite := latents.states.isfinite().flatten(1).all(dim=1)).all():
            row = self.numbers[finite.tolist().index(False)]
            raise FloatingPointError(f"agent {role!r}: the latents of row {row} are not finite in {agent.dtype}")
        for result in self.answers:
            result.latent_steps[role] = result.latent_steps.get(role, 0) + steps
        return latents

    def write(self, turn: Turn) -> list[str]:
        role = turn.visit.role
        agent, how = self.system.agents[role], self.plan.decoding[role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(turn.visit)
        tokens = agent.decode(turn.prompt, *settings, rows=self.numbers, **self.running(turn.visit))
        for result, row in zip(self.answers, tokens, strict=True):
            result.text_tokens[role] = result.text_tokens.get(role, 0) + len(row)
        return [agent.text(row) for row in tokens]

    def write_answers(self, turn: Turn, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """The turn of the agent that answers, with its calls of tools."""
        visit, toolbox = turn.visit, self.plan.options.toolbox
        agent, how = self.system.agents[visit.role], self.plan.decoding[visit.role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(visit)
        caller = Caller(toolbox, len(self.rows), agent.text, agent.literal) if toolbox.tools else None
        pieces = [Detokenizer(agent.text) for _ in self.rows]
        for result in self.answers:
            result.text_tokens.setdefault(visit.role, 0)
        for grown in agent.write(turn.prompt, *settings, rows=self.numbers, reply=caller, **self.running(visit)):
            for row, tokens in grown.items():
                self.answers[row].tokens += tokens
                self.answers[row].text_tokens[visit.role] += 1
                if in_pieces and (piece := pieces[row].add(tokens)):
                    yield self.numbers[row], piece
                    self.system.load_weights(visit.role)  # the caller may have asked the system something else
        for row, result in enumerate(self.answers):
            result.text = text_of(result.tokens, agent.text)
            if caller is not None:
                result.tool_calls = caller.calls[row]
            if in_pieces and (piece := pieces[row].finish()):
                yield self.numbers[row], piece
        turn.message = [result.text for result in self.answers]

    def running(self, visit: Visit) -> dict[str, Any]:
        """How an agent reads its prompts, and whether its weights stay where they are afterwards."""
        return {"prefill": self.prefill(visit), "weights_stay": self.system.offloader is None}

    def prefill(self, visit: Visit) -> Prefill:
        """Reads the prompts of a visit, resuming from prefixes that the same model has read before."""
        decoder_of = {role: agent.decoder for role, agent in self.system.agents.items()}
        later = self.visits[self.visits.index(visit) + 1 :]
        same = [after for after in later if decoder_of[after.role] is decoder_of[visit.role]]
        upcoming = next((after for after in same if after.role == visit.role), same[0] if same else None)
        ids = None if upcoming is None else partial(self.system.prefix_ids, upcoming, self.rows)
        return self.prefix_reuse.prefill(visit.role, ids)

    def seed(self, visit: Visit) -> tuple[int, ...]:
        return self.plan.options.seed, visit.round, self.system.pattern.roles.index(visit.role)

    def account(self, turn: Turn) -> None:
        """Seconds and prompt positions of the turn that just ended."""
        if turn.prompt.embeds.is_cuda:
            torch.cuda.synchronize(turn.prompt.embeds.device)
        now = time.perf_counter()
        stage = f"round {turn.visit.round}, {turn.visit.role}"
        seconds, reading = self.answers.seconds, self.answers.reading
        seconds[stage] = seconds.get(stage, 0.0) + now - self.started
        reading.setdefault(stage, Reading()).add(self.prefix_reuse.last)
        self.started = now
        self.visited += len(self.rows)
        if self.plan.progress is not None:
            self.plan.progress(len(self.rows))

    def record(self, visit: Visit, message: Message) -> None:
        """One handoff per agent that will read this message."""
        for later in self.visits:
            if (visit.role, visit.round) not in zip(later.senders, later.sender_rounds, strict=True):
                continue
            for row, result in enumerate(self.answers):
                handoff = Handoff(later.round, visit.role, later.role)
                if isinstance(message, Latents):
                    handoff.latents = message.states[row].cpu()
                else:
                    handoff.text = message[row]
                result.handoffs.append(handoff)
