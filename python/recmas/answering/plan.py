"""`Plan`: the options of a run, checked against a system and with the system's own settings filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from recmas.answering.answers import Answers
from recmas.answering.options import AnswerOptions
from recmas.config.pattern import Visit
from recmas.config.system_json import Decoding
from recmas.engine.messages import Message
from recmas.system.system import System

OnMessage = Callable[[Visit, Message], Message]
OnAnswers = Callable[[Sequence[int], Answers], object]


class Plan:
    """What a run will do.

    Args:
        system: whose agents answer.
        options: as asked for.
        on_message, on_text, on_answers, skip, progress: as `RecursiveMAS.answer` takes them.

    Attributes:
        rounds: of the run.
        latent_steps: by role.
        decoding: by role.

    Raises:
        ValueError: links or slots that the rounds need are missing, or options that an agent cannot run with.
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
        self.system, self.options = system, options
        self.rounds = system.defaults.rounds if options.rounds is None else options.rounds
        system.check_run(self.rounds, links=options.mode == "latent")
        self.latent_steps = system.steps_by_role(options.latent_steps)
        asked: dict[str, Any] = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
        changes = {name: value for name, value in asked.items() if value is not None}
        self.decoding: dict[str, Decoding] = {
            role: replace(setting.decoding, **changes) for role, setting in system.settings.items()
        }
        self.on_message, self.on_text, self.on_answers = on_message, on_text, on_answers
        self.skip, self.progress = skip, progress
