"""`Manner`: how rows are answered: options checked against a system, with its own settings filled in. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recmas.answering.options import AnswerOptions
from recmas.config.outline import Outline
from recmas.config.system_json import Decoding


class Manner:
    """How rows are answered.

    Args:
        outline: of the system.
        options: as asked for.

    Attributes:
        pattern: of the system.
        rounds: of the run.
        latent_steps: by role.
        decoding: by role.

    Raises:
        ValueError: links or slots that the rounds need are missing, or options that an agent cannot run with.
    """

    def __init__(self, outline: Outline, options: AnswerOptions) -> None:
        self.options, self.pattern = options, outline.pattern
        self.rounds = outline.defaults.rounds if options.rounds is None else options.rounds
        outline.check_run(self.rounds, links=options.mode == "latent")
        self.latent_steps = outline.steps_by_role(options.latent_steps)
        if options.settle is not None:
            if options.mode == "latent" and self.rounds > 1 and self.latent_steps[self.pattern.last] == 0:
                raise ValueError(f"settle: {self.pattern.last!r} takes 0 latent steps, so it sends nothing to compare")
            if options.mode == "text" and options.toolbox.tools:
                raise ValueError("settle: in mode 'text' tools serve the last round alone, which may not come")
        asked: dict[str, Any] = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
        changes = {name: value for name, value in asked.items() if value is not None}
        self.decoding: dict[str, Decoding] = {
            role: replace(setting.decoding, **changes) for role, setting in outline.settings.items()
        }
