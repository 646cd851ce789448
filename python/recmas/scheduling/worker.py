"""`Worker`: runs tasks on one agent of a system, in whichever process the agent is."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from recmas.agents.detokenizer import Detokenizer
from recmas.agents.model import PromptTooLongError
from recmas.answering.answers import RowError
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.engine.messages import Latents, Message, Prompt
from recmas.engine.prefill import Prefill
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.scheduling.task import Account, Grown, Task
from recmas.system.member import Member
from recmas.system.nearest import nearest_tokens
from recmas.tools import Caller, Toolbox

HELD = 4
"""Batches whose prefixes are kept for their next visit, unless somebody says otherwise."""


class Worker:
    """One agent at work.

    Args:
        member: the agent, its links and prompts.
        toolbox: what it may call while it writes an answer.
        prefix_reuse: keep prefixes of a batch for its next visit, and, where weights stay, those that all batches have,
            for good (`recmas.engine.prefix_reuse`).
        held: batches whose prefixes are kept; the one unused for longest goes first.
        load_weights: under offload, brings the agent's weights to its device.
        weights_stay: False under offload.
    """

    def __init__(
        self,
        member: Member,
        toolbox: Toolbox | None = None,
        *,
        prefix_reuse: bool = True,
        held: int = HELD,
        load_weights: Callable[[], object] = lambda: None,
        weights_stay: bool = True,
    ) -> None:
        self.member, self._toolbox, self._reuse = member, toolbox or Toolbox(()), prefix_reuse
        self._held = held
        self._load_weights, self._weights_stay = load_weights, weights_stay
        self._prefixes: OrderedDict[tuple[int, ...], PrefixReuse] = OrderedDict()
        self._constants = ConstantPrefixes() if prefix_reuse and weights_stay else None

    @torch.no_grad()
    def think(self, task: Task, messages: Mapping[str, Message]) -> tuple[Latents, Account]:
        """The latents of a task's rows.

        Raises:
            RowError: a prompt beyond the model's context.
            FloatingPointError: latents that are not finite.
        """
        started = time.perf_counter()
        steps, member = task.work.latent_steps, self.member
        assert steps is not None
        if member.inner_link is None:
            raise ValueError(f"agent {member.role!r} has no inner link, so it sends no latents")
        prompt, account = self._prompt(task, messages)
        prefill = self._prefill(task)
        latents = member.agent.think(prompt, steps, member.inner_link, prefill=prefill, weights_stay=self._weights_stay)
        if not bool(latents.states.isfinite().all()):
            raise FloatingPointError(f"agent {member.role!r}: latents are not finite in {member.agent.dtype}")
        account.latent_steps = steps
        account.seconds = time.perf_counter() - started
        return latents, account

    @torch.no_grad()
    def write(self, task: Task, messages: Mapping[str, Message], account: Account) -> Iterator[dict[int, Grown]]:
        """Write the texts of a task's rows; after every step, what it added, by place in the batch.

        A row ends with an end-of-text token, at its own `max_new_tokens` or at the end of the context, and what it took
        comes with its last step; the batch ends when all its rows have ended or been dropped.

        Args:
            task: what is done.
            messages: what is read.
            account: filled in by the end.

        Raises:
            RowError: a prompt beyond the model's context.
            FloatingPointError: logits that are not finite.
        """
        started = time.perf_counter()
        work, parts, agent = task.work, task.parts, self.member.agent
        prompt, begun = self._prompt(task, messages)
        account.positions, account.nearest = begun.positions, begun.nearest
        account.written = [0] * len(parts)
        calls = self._toolbox.tools and work.final
        caller = Caller(self._toolbox, len(parts), agent.text, agent.literal) if calls else None
        account.tool_calls = [[] for _ in parts] if caller is None else caller.calls
        pieces = [Detokenizer(agent.text) for _ in parts]
        going = {place for place, part in enumerate(parts) if part.max_new_tokens > 0}
        ends = agent.eos_ids
        context = math.inf if agent.context_length is None else agent.context_length
        space = [context - positions + 1 for positions in account.positions]

        def reply(place: int, token: int, room: int) -> list[int]:
            """What tools say to a row that goes on."""
            assert caller is not None
            last = account.written[place] + 1 == parts[place].max_new_tokens
            return caller(place, token, 0 if last else room) if place in going else []

        steps = agent.write(
            prompt,
            max(part.max_new_tokens for part in parts),
            work.temperature,
            work.top_p,
            (),
            rows=[part.stream for part in parts],
            reply=None if caller is None else reply,
            prefill=self._prefill(task),
            weights_stay=self._weights_stay,
        )
        for step in steps:
            grown = {}
            account.seconds = time.perf_counter() - started
            for place in sorted(going & step.keys()):
                tokens = step[place]
                account.written[place] += 1
                space[place] -= len(tokens)
                grown[place] = Grown(tokens, pieces[place].add(tokens))
                complete = tokens[0] in ends  # what follows it is a tool's
                if complete or account.written[place] == parts[place].max_new_tokens or space[place] <= 0:
                    going.discard(place)
                    account.complete |= {place} if complete else set()
                    grown[place].text += pieces[place].finish()
                    grown[place].took = account.of(place)
            yield grown
            going -= task.dropped
            if not going:
                break
            self._load_weights()
        account.seconds = time.perf_counter() - started

    def text(self, task: Task, messages: Mapping[str, Message]) -> tuple[list[str], Account]:
        """The texts of a task's rows, at their end; errors as `write`."""
        account, texts = Account(), [""] * len(task.parts)
        for step in self.write(task, messages, account):
            for place, grown in step.items():
                texts[place] += grown.text
        return texts, account

    def _prompt(self, task: Task, messages: Mapping[str, Message]) -> tuple[Prompt, Account]:
        self._load_weights()
        parts = task.parts
        prompt = self.member.prompt([part.visit for part in parts], [part.fields for part in parts], messages)
        account = Account(positions=prompt.mask.sum(dim=1).tolist())
        try:
            self.member.agent.check_context(account.positions)
        except PromptTooLongError as error:
            raise RowError(str(error)) from error
        for place, part in enumerate(parts):
            for sender in part.visit.senders if part.nearest else ():
                message = messages[sender]
                if isinstance(message, Latents):
                    states = message.states[place, : message.counts()[place]]
                    found = nearest_tokens(self.member, self.member.link_key(sender, part.visit), states, part.nearest)
                    account.nearest.setdefault(place, {})[sender] = found
        return prompt, account

    def _prefill(self, task: Task) -> Prefill:
        """Reads the prompts; a batch that comes again resumes from the prefixes of its last visit."""
        rows = tuple(part.number for part in task.parts)
        kept = self._prefixes.pop(rows, None) or PrefixReuse(self._reuse, self._constants)
        rounds = [part.again for part in task.parts if part.again is not None]
        upcoming = None
        if len(rounds) == len(rows):
            self._prefixes[rows] = kept
            while len(self._prefixes) > self._held:
                self._prefixes.popitem(last=False)
            upcoming = partial(self.member.prompts.prefix_ids, rounds, [part.fields for part in task.parts])
        round = task.parts[0].visit.round
        constant = () if self._constants is None else self.member.prompts.constant_ids(round)
        return kept.prefill(self.member.role, upcoming, constant)
