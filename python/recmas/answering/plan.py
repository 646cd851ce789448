"""`Plan`: a run of a loaded system: how its rows are answered, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from recmas.answering.answers import Answers
from recmas.answering.manner import Manner
from recmas.answering.options import AnswerOptions
from recmas.config.pattern import Visit
from recmas.engine.messages import Message
from recmas.system.system import System

OnMessage = Callable[[Visit, Message], Message]
OnAnswers = Callable[[Sequence[int], Answers], object]


class Plan(Manner):
    """What a run will do.

    Args:
        system: whose agents answer.
        options: as asked for.
        on_message, on_text, on_answers, skip, progress: as `RecursiveMAS.answer` takes them.

    Raises:
        ValueError: as `Manner`.
    """

    def __init__(
        self,
        system: System,
        options: AnswerOptions,
        *,
        on_message: OnMessage | None = None,
        on_text: Callable[[int, str], object] | None = None,
        on_answers: OnAnswers | None = None,
        skip: Collection[int] = (),
        progress: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(system.outline, options)
        if on_text is not None and options.settle is not None and options.mode == "text":
            raise ValueError("settle: in mode 'text' a text is the answer only when the next one is there: no pieces")
        self.system = system
        self.on_message, self.on_text, self.on_answers = on_message, on_text, on_answers
        self.skip, self.progress = skip, progress
