"""`AnswerOptions`: how questions are answered. No torch here, so that the command line can read the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from recmas.sizing import BATCH_SIZE
from recmas.tools import Tool, Toolbox

MODES = ("latent", "text")
SETTLED = 0.98
"""What `settle` is where rounds are "auto"; on validation questions of the relay lab none from 0.9 on lost any."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How questions are answered; frozen, and handed on whole.

    Attributes:
        mode: "latent", or "text": the recursive text system, same agents, templates and rounds, text in the slots.
        rounds: rounds of the recursion; None is the system's own.
        settle: end a question's rounds as soon as what the last agent sends has settled: latents whose cosine with
            those of the round before is at least this, in (0, 1], or a text that is the same; then the answer is that
            of so many rounds. None is never.
        latent_steps: latent thoughts per message, for all agents or by role; None is the system's own.
        max_new_tokens: most tokens per text; None is each agent's own setting.
        temperature: of sampling, 0 is greedy; None is each agent's own setting.
        top_p: nucleus of sampling, in (0, 1]; None is each agent's own setting.
        seed: seed of sampling; a row's result depends on it and on the row's number, not on other rows.
        batch_size: rows at once, of similar length. "auto" takes as many as an estimate says that the free memory of
            the devices holds (`recmas.sizing`), and fewer if that runs out all the same: it begins that batch again, so
            `on_message` and `tools` may be called twice for a row.
        trace: keep every handoff in `Answer.handoffs`.
        prefix_reuse: resume from a cached prefix and run only the tokens that differ, where a prompt begins as an
            earlier one of the same batch and agent, or as all of its template do (`recmas.engine.prefix_reuse`); the
            same answers but for rounding. `Answers.reading` counts what it saved.
        tools: what the last agent may call while it writes its answer (`recmas.tools`); none by default.

    Raises:
        ValueError: a value that no system could run with; one line that names the option.
    """

    mode: str = "latent"
    rounds: int | None = None
    settle: float | None = None
    latent_steps: int | Mapping[str, int] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int | str | None = BATCH_SIZE
    trace: bool = False
    prefix_reuse: bool = True
    tools: Toolbox | Sequence[Tool] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: {self.mode!r} is not one of {', '.join(MODES)}")
        if self.settle is not None and not (isinstance(self.settle, Real) and 0 < self.settle <= 1):
            raise ValueError(f"settle: {self.settle!r} is not in (0, 1]")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: {self.seed!r} is not an integer")
        if self.batch_size is None:  # as calls may say that they have no wish
            object.__setattr__(self, "batch_size", BATCH_SIZE)
        size = self.batch_size
        if isinstance(size, str) and size != "auto":
            raise ValueError(f"batch_size: {size!r} is neither a number nor 'auto'")
        if not isinstance(size, str) and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_size: {size!r} is not positive")
        if not isinstance(self.tools, Toolbox):
            object.__setattr__(self, "tools", Toolbox(self.tools))

    @classmethod
    def of(cls, options: AnswerOptions | None, **changes: Any) -> AnswerOptions:
        """`options` (None: the defaults) with some fields changed.

        Raises:
            TypeError: no `AnswerOptions`, or a change that is no field.
        """
        if options is not None and not isinstance(options, cls):
            raise TypeError(f"options: {type(options).__name__}, expected AnswerOptions")
        known = [field.name for field in fields(cls)]
        for name in changes:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; there is {', '.join(known)}")
        return replace(options or cls(), **changes)

    @property
    def toolbox(self) -> Toolbox:
        """`tools` as the `Toolbox` they were put into."""
        assert isinstance(self.tools, Toolbox)
        return self.tools
