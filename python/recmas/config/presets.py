"""Presets: patterns with prompts of their own, to compare a recursive system with. No torch here.

Two are published ways of letting language models work together in words, the third is one model that is looped. The
prompts are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recmas.config.pattern import Pattern
from recmas.config.system_json import PromptSpec


@dataclass(frozen=True)
class Preset:
    """A way of working together.

    Attributes:
        pattern: who reads whom.
        rounds: the default of its systems.
        prompts: by role.
        links: whether its agents exchange latents; else they exchange texts, and have none.
    """

    pattern: Pattern
    rounds: int
    prompts: Mapping[str, PromptSpec] = field(repr=False)
    links: bool = False


_PROPOSERS = ("proposer1", "proposer2", "proposer3")
_REFINERS = ("refiner1", "refiner2", "refiner3")
_QUESTION = "Question: {{question}}\n\n"


def _answers_of(roles: tuple[str, ...]) -> str:
    return "".join(f"Answer {number}: {{{{from:{role}}}}}\n\n" for number, role in enumerate(roles, start=1))


_PROPOSE = "Work the question out by yourself. Give the steps that your answer rests on, then the answer."
_REFINE = (
    "These answers were written independently. Each of them may be wrong, and what most of them say may be wrong, too. "
    "Check their steps, then write an answer that is better than any of them."
)
_AGGREGATE = (
    "These answers were checked by their authors against each other. Decide what is right where they differ, and write "
    "one complete answer. Do not mention that there were others."
)

MOA = Preset(
    Pattern((_PROPOSERS, _REFINERS, ("aggregator",))),
    rounds=1,
    prompts={
        **dict.fromkeys(
            _PROPOSERS,
            PromptSpec(f"{_QUESTION}{_PROPOSE}", f"{_QUESTION}Answer so far: {{{{from:aggregator}}}}\n\n{_PROPOSE}"),
        ),
        **dict.fromkeys(_REFINERS, PromptSpec(f"{_QUESTION}{_answers_of(_PROPOSERS)}{_REFINE}")),
        "aggregator": PromptSpec(f"{_QUESTION}{_answers_of(_REFINERS)}{_AGGREGATE}"),
    },
)
"""Mixture of agents (Wang et al., arXiv 2406.04692): two layers of three agents, each of the second reads all answers
of the first, and an aggregator. The layers are stages, so one round is all of it."""

_EXPECT = (
    "Nobody has answered yet. Say in a few sentences what a correct answer has to get right, and which mistakes are "
    "likely. Do not answer."
)
_CRITICISE = (
    "First repeat the present answer. Then criticise it: name every mistake and every gap, and say what has to change "
    "to remove it. Do not write a new answer. If nothing has to change, say so."
)
_APPLY = (
    "Write the complete answer. Where the criticism repeats an earlier answer, change in it what the criticism asks "
    "for, and keep the rest."
)
_PRESENT = "Present answer: {{from:optimizer}}\n\n"

TEXTGRAD = Preset(
    Pattern((("evaluator",), ("optimizer",))),
    rounds=3,
    prompts={
        "evaluator": PromptSpec(f"{_QUESTION}{_EXPECT}", f"{_QUESTION}{_PRESENT}{_CRITICISE}"),
        "optimizer": PromptSpec(f"{_QUESTION}Criticism: {{{{from:evaluator}}}}\n\n{_APPLY}"),
    },
)
"""Textual gradients (Yuksekgonul et al., arXiv 2406.07496): the answer is the variable, an evaluator's criticism its
gradient, and an optimizer applies it. The first round writes the answer, each further one is a step."""

_THINK = "Work the question out step by step, then give the answer."
_AGAIN = (
    "These are your own thoughts about it so far. Go over them once more: correct what is wrong, add what is missing, "
    "then give the answer."
)

LOOPLM = Preset(
    Pattern((("thinker",),)),
    rounds=3,
    prompts={
        "thinker": PromptSpec(f"{_QUESTION}{_THINK}", f"{_QUESTION}Thoughts: {{{{from:thinker}}}}\n\n{_AGAIN}"),
    },
    links=True,
)
"""A looped language model (LoopLM, a baseline of arXiv 2604.25917): one model that goes over the question again and
again, each time reading its own latents of the time before, through links that are trained as any others."""

PRESETS = {"moa": MOA, "textgrad": TEXTGRAD, "looplm": LOOPLM}
