"""Answering: a plan checked before any model runs, then batches of similar length through the shared walk."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recmas import chats, spec
from recmas.agent import PromptTooLongError
from recmas.batching import batches
from recmas.cache import Reader
from recmas.decoding import Detokenizer, text_of
from recmas.lengths import check_lengths
from recmas.pattern import Visit
from recmas.prefix import Prefixes, Reading
from recmas.spec import Decoding
from recmas.splice import Latents, Prompt
from recmas.tools import Caller, Tool, Toolbox, ToolCall

if TYPE_CHECKING:
    from recmas.system import RecursiveMAS

Row = str | Mapping[str, object] | Sequence[Mapping[str, str]]
Message = Latents | list[str]
MODES = ("latent", "text")


@dataclass
class Handoff:
    """What `target` read from `source` in `round`: latents ``[m, d_source]`` (through the inner link) or text."""

    round: int
    source: str
    target: str
    latents: Tensor | None = None
    text: str | None = None


@dataclass
class Answer:
    """The answer to one row.

    Attributes:
        text: what the last agent wrote, without special tokens; results of tools stand where it read them.
        tokens: its token ids, the end-of-text token and results of tools included.
        latent_steps: latent steps by role, over all rounds.
        text_tokens: tokens that each role wrote, over all rounds, the answer's included; results of tools are not.
        tool_calls: in order.
        handoffs: every handoff, where a trace was asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    latent_steps: dict[str, int] = field(default_factory=dict)
    text_tokens: dict[str, int] = field(default_factory=dict)
    tool_calls: list[ToolCall] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)


class Answers(list[Answer]):
    """Answers in the order of the rows.

    Attributes:
        seconds: time of each stage by "round R, ROLE", over all batches.
        reading: how the prompts of each stage were read, by the same names.
    """

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        super().__init__(answers)
        self.seconds: dict[str, float] = {}
        self.reading: dict[str, Reading] = {}

    def take(self, part: Answers, numbers: Sequence[int]) -> None:
        """Put the answers of one batch in the places of its rows, and its account to the others'."""
        for number, answer in zip(numbers, part, strict=True):
            self[number] = answer
        for stage, seconds in part.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for stage, reading in part.reading.items():
            self.reading.setdefault(stage, Reading()).add(reading)


class Plan:
    """The arguments of `RecursiveMAS.answer`, checked and with the system's own settings filled in."""

    def __init__(
        self,
        mas: RecursiveMAS,
        *,
        mode: str = "latent",
        rounds: int | None = None,
        latent_steps: int | Mapping[str, int] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        trace: bool = False,
        prefix_reuse: bool = True,
        tools: Toolbox | Sequence[Tool] = (),
        on_message: Callable[[Visit, Message], Message] | None = None,
        on_text: Callable[[int, str], object] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        self.mas, self.mode, self.seed, self.trace = mas, mode, seed, trace
        self.prefix_reuse = prefix_reuse
        self.rounds = mas.defaults.rounds if rounds is None else rounds
        mas.check_run(self.rounds, links=mode == "latent")
        self.latent_steps = steps_by_role(mas, latent_steps)
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        changes = {name: value for name, value in given.items() if value is not None}
        self.decoding: dict[str, Decoding] = {
            role: replace(setting.decoding, **changes) for role, setting in mas.settings.items()
        }
        self.toolbox = tools if isinstance(tools, Toolbox) else Toolbox(tools)
        self.on_message, self.on_text, self.progress = on_message, on_text, progress


def steps_by_role(mas: RecursiveMAS, asked: int | Mapping[str, int] | None) -> dict[str, int]:
    """Latent steps of every agent of `mas` (`recmas.spec.steps_by_role`)."""
    return spec.steps_by_role(mas.settings, mas.defaults, asked)


def answer(plan: Plan, rows: Iterable[Row], batch_size: int | str | None) -> Answers:
    """Run `plan` over `rows` in batches of rows of similar length; see `RecursiveMAS.answer`."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise ValueError(f"rows: a single {type(rows).__name__}, expected a list of questions")
    fields = [chats.read_row(row, index) for index, row in enumerate(rows)]
    plan.mas.check_rows(fields, plan.rounds)
    check_lengths(plan, fields)
    answers, queue = Answers(Answer() for _ in fields), batches(plan, fields, batch_size)
    try:
        for numbers in queue:
            part = Answers(Answer() for _ in numbers)
            batch, shown = _Batch(plan, part, fields, numbers), False
            try:
                for row, piece in batch.run(in_pieces=plan.on_text is not None):
                    assert plan.on_text is not None
                    shown = True
                    plan.on_text(row, piece)
            except torch.OutOfMemoryError:
                if shown or not queue.halve():  # text that was shown cannot be taken back
                    raise
                if plan.progress is not None:
                    plan.progress(-batch.visited)
            else:
                answers.take(part, numbers)
    finally:
        plan.mas.rest()
    return answers


def stream(plan: Plan, row: Row) -> Generator[str, None, Answer]:
    """Run `plan` on one row; see `RecursiveMAS.stream`. Everything is checked before the first piece is asked for."""
    fields = [chats.read_row(row, 0)]
    plan.mas.check_rows(fields, plan.rounds)
    check_lengths(plan, fields)

    def pieces() -> Generator[str, None, Answer]:
        answers = Answers([Answer()])
        try:
            for _, piece in _Batch(plan, answers, fields, [0]).run(in_pieces=True):
                if plan.on_text is not None:
                    plan.on_text(0, piece)
                yield piece
        finally:
            plan.mas.rest()
        return answers[0]

    return pieces()


class _Batch:
    """Some of the rows on their way through the system; `answers` are theirs, in the order of their numbers."""

    def __init__(
        self, plan: Plan, answers: Answers, fields: Sequence[Mapping[str, object]], numbers: Sequence[int]
    ) -> None:
        self.plan, self.seconds, self.reading, self.numbers = plan, answers.seconds, answers.reading, numbers
        self.visits = list(plan.mas.pattern.visits(plan.rounds))
        self.prefixes = Prefixes(plan.prefix_reuse)
        self.rows = [fields[number] for number in numbers]
        self.answers = list(answers)
        self.started, self.visited = 0.0, 0
        self.last: tuple[Visit, Prompt] | None = None

    @torch.no_grad()
    def run(self, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """Fill in the answers; yields the number of a row and a piece of its text as it is written, if asked to."""
        self.started = time.perf_counter()
        try:
            self.plan.mas.walk(self.rows, self.plan.rounds, self.speak)
            assert self.last is not None
            yield from self.conclude(*self.last, in_pieces)
        except PromptTooLongError as error:
            raise ValueError(f"row {self.numbers[error.row]}: {error}") from error
        self.account(*self.last)

    def speak(self, visit: Visit, prompt: Prompt) -> Message:
        """The message of an agent; the last agent's text is written by `conclude`, piece by piece."""
        if visit.final:
            self.last = visit, prompt
            return []
        plan = self.plan
        message = self.think(visit, prompt) if plan.mode == "latent" else self.write(visit, prompt)
        if plan.on_message is not None:
            message = plan.on_message(visit, message)
        if plan.trace:
            self.record(visit, message)
        self.account(visit, prompt)
        return message

    def account(self, visit: Visit, prompt: Prompt) -> None:
        if prompt.embeds.is_cuda:
            torch.cuda.synchronize(prompt.embeds.device)
        now = time.perf_counter()
        stage = f"round {visit.round}, {visit.role}"
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.started
        self.started = now
        self.visited += len(self.rows)
        self.reading.setdefault(stage, Reading()).add(self.prefixes.last)
        if self.plan.progress is not None:
            self.plan.progress(len(self.rows))

    def think(self, visit: Visit, prompt: Prompt) -> Latents:
        steps = self.plan.latent_steps[visit.role]
        agent, link = self.plan.mas.agents[visit.role], self.plan.mas.inner_links[visit.role]
        latents = agent.think(prompt, steps, link, reader=self.reader(visit))
        for result in self.answers:
            result.latent_steps[visit.role] = result.latent_steps.get(visit.role, 0) + steps
        return latents

    def write(self, visit: Visit, prompt: Prompt) -> list[str]:
        agent, how = self.plan.mas.agents[visit.role], self.plan.decoding[visit.role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(visit)
        tokens = agent.decode(prompt, *settings, rows=self.numbers, reader=self.reader(visit))
        for result, row in zip(self.answers, tokens, strict=True):
            result.text_tokens[visit.role] = result.text_tokens.get(visit.role, 0) + len(row)
        return [agent.text(row) for row in tokens]

    def conclude(self, visit: Visit, prompt: Prompt, in_pieces: bool) -> Iterator[tuple[int, str]]:
        """The last agent's text, with its calls of tools."""
        agent, how = self.plan.mas.agents[visit.role], self.plan.decoding[visit.role]
        settings = how.max_new_tokens, how.temperature, how.top_p, self.seed(visit)
        toolbox = self.plan.toolbox
        caller = Caller(toolbox, len(self.rows), agent.text, agent.literal) if toolbox.tools else None
        texts = [Detokenizer(agent.text) for _ in self.rows]
        for result in self.answers:
            result.text_tokens.setdefault(visit.role, 0)
        for grown in agent.write(prompt, *settings, rows=self.numbers, reply=caller, reader=self.reader(visit)):
            for row, tokens in grown.items():
                self.answers[row].tokens += tokens
                self.answers[row].text_tokens[visit.role] += 1
                if in_pieces and (piece := texts[row].add(tokens)):
                    yield self.numbers[row], piece
                    self.plan.mas.bring(visit.role)  # whoever got the piece may have asked the system something else
        for row, result in enumerate(self.answers):
            result.text = text_of(result.tokens, agent.text)
            if caller is not None:
                result.tool_calls = caller.calls[row]
            if in_pieces and (piece := texts[row].finish()):
                yield self.numbers[row], piece

    def reader(self, visit: Visit) -> Reader:
        """Reads the prompts of a visit, from where earlier ones of the same model differ."""
        mas = self.plan.mas
        later = self.visits[self.visits.index(visit) + 1 :]
        same = [after for after in later if mas.agents[after.role].decoder is mas.agents[visit.role].decoder]
        coming = next((after for after in same if after.role == visit.role), same[0] if same else None)
        return self.prefixes.reader(visit.role, None if coming is None else partial(mas.prefix, coming, self.rows))

    def seed(self, visit: Visit) -> tuple[int, ...]:
        return self.plan.seed, visit.round, self.plan.mas.pattern.roles.index(visit.role)

    def record(self, visit: Visit, message: Message) -> None:
        """One handoff per agent that will hear this message."""
        for later in self.plan.mas.pattern.visits(self.plan.rounds):
            if (visit.role, visit.round) not in zip(later.senders, later.heard, strict=True):
                continue
            for row, result in enumerate(self.answers):
                handoff = Handoff(later.round, visit.role, later.role)
                if isinstance(message, Latents):
                    handoff.latents = message.states[row].cpu()
                else:
                    handoff.text = message[row]
                result.handoffs.append(handoff)
