"""Answering: a plan checked before any model runs, then batches of similar length through the shared walk."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recmas.pattern import Visit
from recmas.spec import Decoding
from recmas.splice import Latents, Prompt

if TYPE_CHECKING:
    from recmas.system import RecursiveMAS

Message = Latents | list[str]
MODES = ("latent", "text")
BATCH_SIZE = 32


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
        text: what the last agent wrote, without special tokens.
        tokens: its token ids, the end-of-text token included.
        latent_steps: latent steps by role, over all rounds.
        text_tokens: decoded tokens by role, over all rounds, the answer's included.
        handoffs: every handoff, where a trace was asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    latent_steps: dict[str, int] = field(default_factory=dict)
    text_tokens: dict[str, int] = field(default_factory=dict)
    handoffs: list[Handoff] = field(default_factory=list)


class Answers(list[Answer]):
    """Answers in the order of the rows; `seconds` holds the time of each stage by "round R, ROLE", over all batches."""

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        super().__init__(answers)
        self.seconds: dict[str, float] = defaultdict(float)


class Plan:
    """The arguments of `RecursiveMAS.answer`, checked and with the system's own settings filled in."""

    def __init__(
        self,
        mas: RecursiveMAS,
        mode: str,
        rounds: int | None,
        latent_steps: int | Mapping[str, int] | None,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int,
        trace: bool,
        on_message: Callable[[Visit, Message], Message] | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        self.mas, self.mode, self.seed, self.trace = mas, mode, seed, trace
        self.rounds = mas.defaults.rounds if rounds is None else rounds
        mas.check_run(self.rounds, links=mode == "latent")
        self.latent_steps = steps_by_role(mas, latent_steps)
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        changes = {name: value for name, value in given.items() if value is not None}
        self.decoding: dict[str, Decoding] = {
            role: replace(setting.decoding, **changes) for role, setting in mas.settings.items()
        }
        self.on_message, self.progress = on_message, progress


def steps_by_role(mas: RecursiveMAS, asked: int | Mapping[str, int] | None) -> dict[str, int]:
    steps = {}
    for role, setting in mas.settings.items():
        steps[role] = mas.defaults.latent_steps if setting.latent_steps is None else setting.latent_steps
    if isinstance(asked, Mapping):
        for role in asked:
            if role not in steps:
                raise ValueError(f"latent_steps: unknown role {role!r}; the pattern has {', '.join(steps)}")
        steps.update(asked)
    elif asked is not None:
        steps = dict.fromkeys(steps, asked)
    for role, count in steps.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"latent_steps: {count!r} for {role!r} is not an integer >= 0")
    return steps


def answer(plan: Plan, rows: Iterable[str | Mapping[str, object]], batch_size: int | None) -> Answers:
    """Run `plan` over `rows` in batches of rows of similar length; see `RecursiveMAS.answer`."""
    if isinstance(rows, str | Mapping):
        raise ValueError(f"rows: a single {type(rows).__name__}, expected a list of questions")
    fields: list[Mapping[str, object]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, str | Mapping):
            raise ValueError(f"row {index}: {type(row).__name__}, expected a string or a mapping of fields")
        fields.append({"question": row} if isinstance(row, str) else row)
    size = BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size: {size} is not positive")
    plan.mas.check_rows(fields, plan.rounds)
    answers = Answers(Answer() for _ in fields)
    by_length = sorted(range(len(fields)), key=lambda index: sum(len(str(value)) for value in fields[index].values()))
    for start in range(0, len(by_length), size):
        _Batch(plan, answers, fields, by_length[start : start + size]).run()
    return answers


class _Batch:
    """Some of the rows on their way through the system."""

    def __init__(
        self, plan: Plan, answers: Answers, fields: Sequence[Mapping[str, object]], numbers: Sequence[int]
    ) -> None:
        self.plan, self.seconds, self.numbers = plan, answers.seconds, numbers
        self.rows = [fields[number] for number in numbers]
        self.answers = [answers[number] for number in numbers]
        self.started = 0.0

    @torch.no_grad()
    def run(self) -> None:
        self.started = time.perf_counter()
        self.plan.mas.walk(self.rows, self.plan.rounds, self.speak)

    def speak(self, visit: Visit, prompt: Prompt) -> Message:
        plan = self.plan
        message = self.think(visit, prompt) if plan.mode == "latent" and not visit.final else self.write(visit, prompt)
        if plan.on_message is not None and not visit.final:
            message = plan.on_message(visit, message)
        if plan.trace and not visit.final:
            self.record(visit, message)
        if prompt.embeds.is_cuda:
            torch.cuda.synchronize(prompt.embeds.device)
        now = time.perf_counter()
        self.seconds[f"round {visit.round}, {visit.role}"] += now - self.started
        self.started = now
        if plan.progress is not None:
            plan.progress(len(self.rows))
        return message

    def think(self, visit: Visit, prompt: Prompt) -> Latents:
        steps = self.plan.latent_steps[visit.role]
        latents = self.plan.mas.agents[visit.role].think(prompt, steps, self.plan.mas.inner_links[visit.role])
        for result in self.answers:
            result.latent_steps[visit.role] = result.latent_steps.get(visit.role, 0) + steps
        return latents

    def write(self, visit: Visit, prompt: Prompt) -> list[str]:
        agent, how = self.plan.mas.agents[visit.role], self.plan.decoding[visit.role]
        seed = (self.plan.seed, visit.round, self.plan.mas.pattern.roles.index(visit.role))
        tokens = agent.decode(prompt, how.max_new_tokens, how.temperature, how.top_p, seed, rows=self.numbers)
        texts = [agent.text(row) for row in tokens]
        for result, row, text in zip(self.answers, tokens, texts, strict=True):
            result.text_tokens[visit.role] = result.text_tokens.get(visit.role, 0) + len(row)
            if visit.final:
                result.text, result.tokens = text, row
        return texts

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
