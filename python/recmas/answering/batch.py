"""One batch of rows on its way through a system: an agent thinks or writes at every turn of the walk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from recmas.agents.detokenizer import Detokenizer, text_of
from recmas.agents.model import PromptTooLongError
from recmas.answering.answers import Answers, Handoff
from recmas.answering.plan import Plan
from recmas.answering.settling import Settling
from recmas.config.pattern import Visit
from recmas.devices.failure import named
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.engine.messages import Latents, Message, Prompt, select
from recmas.engine.prefill import Prefill
from recmas.engine.prefix_reuse import PrefixReuse, Reading
from recmas.prompts.rows import Fields
from recmas.system.system import Turn
from recmas.tools import Caller


class RowsTooLongError(ValueError):
    """Texts that agents wrote made prompts of some rows too long for an agent; `rows` says why, by number."""

    def __init__(self, rows: Mapping[int, str]) -> None:
        first = min(rows)
        super().__init__(f"row {first}: {rows[first]}")
        self.rows = dict(rows)


class Batch:
    """Some of a run's rows.

    Args:
        plan: the run.
        answers: of these rows, to be filled, in the order of their numbers.
        fields: of all rows.
        numbers: of the rows in this batch.
        constants: what all batches of the run begin their prompts with; None where there is but one, and under offload.
    """

    def __init__(
        self,
        plan: Plan,
        answers: Answers,
        fields: Sequence[Fields],
        numbers: Sequence[int],
        constants: ConstantPrefixes | None = None,
    ) -> None:
        self.plan, self.system, self.numbers = plan, plan.system, numbers
        self.visits = list(plan.system.pattern.visits(plan.rounds))
        self.constants = constants
        self.prefix_reuse = PrefixReuse(plan.options.prefix_reuse, constants, self.system.states)
        self.readers: list[PrefixReuse] = []  # that served the turn under way
        self.settling = None if plan.options.settle is None else Settling(plan.options.settle)
        self.going = list(range(len(numbers)))  # places of the rows that have no answer yet
        self.rows = [fields[number] for number in numbers]
        self.answers = answers
        self.started, self.visited = 0.0, 0

    @torch.no_grad()
    def run(self, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """Fill in the answers; yields the number of a row and a piece of its text as it is written, if asked to.

        Raises:
            RowsTooLongError: at the beginning of an agent's turn.
            FloatingPointError: latents or logits that are not finite; names round, agent and row.
        """
        self.started = time.perf_counter()
        try:
            for turn in self.system.walk(self.rows, self.plan.rounds):
                rows = len(self.going)
                with named(f"agent {turn.visit.role!r}", turn.prompt.embeds.device):
                    try:
                        if turn.visit.final:
                            yield from self.write_answers(
                                turn.visit, turn.prompt, self.prefix_reuse, self.going, in_pieces
                            )
                            turn.message = [self.answers[place].text for place in self.going]
                        else:
                            yield from self.send(turn, in_pieces)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"round {turn.visit.round}: {error}") from None
                    self.account(turn, rows)
        except PromptTooLongError as error:
            problems = error.problems.items()
            raise RowsTooLongError({self.numbers[self.going[place]]: problem for place, problem in problems}) from error

    def send(self, turn: Turn, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """The turn of an agent whose message another one reads."""
        message = self.think(turn) if self.plan.options.mode == "latent" else self.write(turn)
        if self.plan.on_message is not None:
            message = self.plan.on_message(turn.visit, message)
        turn.message = message
        if self.settling is not None and turn.visit.role == self.system.pattern.last:
            settled = self.settling.settled(message)
            if any(settled):
                yield from self.end(turn, settled, in_pieces)
                self.settling.keep(turn.stay or [])
        if self.plan.options.trace:
            self.record(turn.visit, message if turn.stay is None else select(message, turn.stay))

    def end(self, turn: Turn, settled: Sequence[bool], in_pieces: bool) -> Iterator[tuple[int, str]]:
        """Answer the rows that have settled, as if this round were the last one; the others go on."""
        assert turn.message is not None
        ends, stays = ([place for place, over in enumerate(settled) if over is which] for which in (True, False))
        ended = [self.going[place] for place in ends]
        if isinstance(turn.message, Latents):
            yield from self.write_answers(
                turn.visit, turn.prompt.select(ends), self.prefix_reuse.select(ends), ended, in_pieces
            )
        for place in ended:  # what would have been read in a later round
            answer = self.answers[place]
            answer.handoffs = [handoff for handoff in answer.handoffs if handoff.round <= turn.visit.round]
        if self.plan.progress is not None:
            left = len(self.visits) - 1 - self.visits.index(turn.visit)
            self.visited += left * len(ends)
            self.plan.progress(left * len(ends))
        turn.stay = stays
        self.going = [self.going[place] for place in stays]
        self.rows = [self.rows[place] for place in stays]
        if stays:
            self.prefix_reuse = self.prefix_reuse.select(stays)

    def think(self, turn: Turn) -> Latents:
        role = turn.visit.role
        agent, link, steps = self.system.agents[role], self.system.inner_links[role], self.plan.latent_steps[role]
        latents = agent.think(turn.prompt, steps, link, **self.running(self.prefill(turn.visit)))
        if not (finite := latents.states.isfinite().flatten(1).all(dim=1)).all():
            row = self.numbers[self.going[finite.tolist().index(False)]]
            raise FloatingPointError(f"agent {role!r}: the latents of row {row} are not finite in {agent.dtype}")
        for place in self.going:
            result = self.answers[place]
            result.latent_steps[role] = result.latent_steps.get(role, 0) + steps
        return latents

    def write(self, turn: Turn) -> list[str]:
        """A text per row; the last agent's is the answer, should it prove to have settled."""
        role = turn.visit.role
        agent, how = self.system.agents[role], self.plan.decoding[role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(turn.visit)
        numbers = [self.numbers[place] for place in self.going]
        tokens = agent.decode(turn.prompt, *settings, rows=numbers, **self.running(self.prefill(turn.visit)))
        for place, row in zip(self.going, tokens, strict=True):
            result = self.answers[place]
            result.text_tokens[role] = result.text_tokens.get(role, 0) + len(row)
            if self.settling is not None and role == self.system.pattern.last:
                result.tokens, result.text, result.rounds = list(row), text_of(row, agent.text), turn.visit.round
        return [text_of(row, agent.text) for row in tokens]

    def write_answers(
        self, visit: Visit, prompt: Prompt, reuse: PrefixReuse, places: Sequence[int], in_pieces: bool
    ) -> Iterator[tuple[int, str]]:
        """The turn of the agent that answers these rows, with its calls of tools."""
        self.readers.append(reuse)
        prefill = reuse.prefill(visit.role, None, self.constant(visit))  # nobody reads these rows' prompts afterwards
        running = self.running(prefill)
        toolbox, answers = self.plan.options.toolbox, [self.answers[place] for place in places]
        numbers = [self.numbers[place] for place in places]
        agent, how = self.system.agents[visit.role], self.plan.decoding[visit.role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(visit)
        caller = Caller(toolbox, len(answers), agent.text, agent.literal) if toolbox.tools else None
        pieces = [Detokenizer(agent.text) for _ in answers]
        for result in answers:
            result.tokens, result.rounds = [], visit.round
            result.text_tokens.setdefault(visit.role, 0)
        for grown in agent.write(prompt, *settings, rows=numbers, reply=caller, **running):
            for row, tokens in grown.items():
                answers[row].tokens += tokens
                answers[row].text_tokens[visit.role] += 1
                if in_pieces and (piece := pieces[row].add(tokens)):
                    yield numbers[row], piece
                    self.system.load_weights(visit.role)  # the caller may have asked the system something else
        for row, result in enumerate(answers):
            result.text = text_of(result.tokens, agent.text)
            if caller is not None:
                result.tool_calls = caller.calls[row]
            if in_pieces and (piece := pieces[row].finish()):
                yield numbers[row], piece

    def running(self, prefill: Prefill) -> dict[str, Any]:
        """How an agent reads its prompts, and whether its weights stay where they are afterwards."""
        return {"prefill": prefill, "weights_stay": self.system.offloader is None}

    def prefill(self, visit: Visit) -> Prefill:
        """Reads the prompts of a visit, resuming from prefixes that the same model has read before."""
        decoder_of = {role: agent.decoder for role, agent in self.system.agents.items()}
        later = self.visits[self.visits.index(visit) + 1 :]
        same = [after for after in later if decoder_of[after.role] is decoder_of[visit.role]]
        upcoming = next((after for after in same if after.role == visit.role), same[0] if same else None)
        ids = None if upcoming is None else partial(self.system.prefix_ids, upcoming, self.rows)
        self.readers.append(self.prefix_reuse)
        return self.prefix_reuse.prefill(visit.role, ids, self.constant(visit))

    def constant(self, visit: Visit) -> Sequence[int]:
        """What prompts of this visit begin with in all batches."""
        return () if self.constants is None else self.system.constant_ids(visit)

    def seed(self, visit: Visit) -> tuple[int, ...]:
        return self.plan.options.seed, visit.round, self.system.pattern.roles.index(visit.role)

    def account(self, turn: Turn, rows: int) -> None:
        """Seconds and prompt positions of the turn that just ended."""
        if turn.prompt.embeds.is_cuda:
            torch.cuda.synchronize(turn.prompt.embeds.device)
        now = time.perf_counter()
        stage = f"round {turn.visit.round}, {turn.visit.role}"
        seconds, reading = self.answers.seconds, self.answers.reading
        seconds[stage] = seconds.get(stage, 0.0) + now - self.started
        for reader in self.readers:
            reading.setdefault(stage, Reading()).add(reader.last)
        self.readers.clear()
        self.started = now
        self.visited += rows
        if self.plan.progress is not None:
            self.plan.progress(rows)

    def record(self, visit: Visit, message: Message) -> None:
        """One handoff per agent that will read this message."""
        for later in self.visits:
            if (visit.role, visit.round) not in zip(later.senders, later.sender_rounds, strict=True):
                continue
            for row, place in enumerate(self.going):
                handoff = Handoff(later.round, visit.role, later.role)
                if isinstance(message, Latents):
                    handoff.latents = message.states[row].cpu()
                else:
                    handoff.text = message[row]
                self.answers[place].handoffs.append(handoff)
