"""Systems of every pattern, and rows that are sent through a dispatcher."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from recmas import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, AnswerOptions, Pattern, RecursiveMAS
from recmas.answering.answers import Answer
from recmas.answering.manner import Manner
from recmas.scheduling.dispatcher import Dispatcher
from recmas.scheduling.row import Row, VisitDone
from tests.runtime.tiny import tiny_agent

PATTERNS = {
    "sequential": SEQUENTIAL,
    "mixture": MIXTURE,
    "distillation": DISTILLATION,
    "deliberation": DELIBERATION,
}
FAMILY_OF = ("qwen3", "granite", "llama", "granite")
QUESTIONS = ["fox", "the lazy dog " * 4, "0 + 1 =", "what is the answer to everything? ", "plan", "?"]


def tiny_system(pattern: Pattern, rounds: int = 2, steps: int = 3) -> RecursiveMAS:
    agents = {
        role: tiny_agent(FAMILY_OF[index], role, 32 + 8 * index, index + 11) for index, role in enumerate(pattern.roles)
    }
    system = RecursiveMAS.create(agents, pattern, rounds=rounds, latent_steps=steps, seed=0)
    for setting in system.settings.values():
        setting.decoding.max_new_tokens = 6
    return system


class Waiting:
    """A sink that keeps everything, and can be waited for."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.visits: list[VisitDone] = []
        self.ends: list[Answer | Exception] = []
        self._over = threading.Event()

    def text(self, piece: str) -> None:
        self.pieces.append(piece)

    def visited(self, visit: VisitDone) -> None:
        self.visits.append(visit)

    def answered(self, answer: Answer) -> None:
        self.ends.append(answer)
        self._over.set()

    def failed(self, error: Exception) -> None:
        self.ends.append(error)
        self._over.set()

    def end(self, seconds: float = 60.0) -> Answer | Exception:
        assert self._over.wait(seconds), "nothing came"
        assert len(self.ends) == 1
        return self.ends[0]


def row_of(system: RecursiveMAS, number: int, question: str, sink: Waiting | None = None, **options: Any) -> Row:
    manner = Manner(system.outline, AnswerOptions(**options))
    return Row(number, {"question": question}, manner, sink or Waiting(), stream=(manner.options.seed, number))


def send(dispatcher: Dispatcher, system: RecursiveMAS, questions: Sequence[str], **options: Any) -> list[Waiting]:
    """Add a row per question, numbered from 0; who waits for each."""
    waiting = [Waiting() for _ in questions]
    for number, (question, sink) in enumerate(zip(questions, waiting, strict=True)):
        dispatcher.add(row_of(system, number, question, sink, **options))
    return waiting
