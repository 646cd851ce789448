"""What the reference implementation releases: styles, repositories, link keys and settings. Facts only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from recmas.config.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Edge, Pattern

TASKS = ("math", "code", "choice")
HUB_ORGANISATION = "RecursiveMAS"
OUTER = "outer"  # the key of the repository of outer links, beside the roles


@dataclass(frozen=True)
class Family:
    """A collaboration pattern as the reference implementation stores it.

    Attributes:
        name: its ``paradigm``.
        pattern: the same pattern here; roles have the same names.
        edges: (source, target) by the key of the outer link.
    """

    name: str
    pattern: Pattern
    edges: dict[str, Edge]


SEQUENTIAL_FAMILY = Family(
    "sequential",
    SEQUENTIAL,
    {"outer_12": ("planner", "critic"), "outer_23": ("critic", "solver"), "outer_31": ("solver", "planner")},
)
MIXTURE_FAMILY = Family(
    "mixture",
    MIXTURE,
    {
        "outer_1s": ("math", "summarizer"),
        "outer_2s": ("code", "summarizer"),
        "outer_3s": ("science", "summarizer"),
        "outer_s1": ("summarizer", "math"),
        "outer_s2": ("summarizer", "code"),
        "outer_s3": ("summarizer", "science"),
    },
)
DISTILLATION_FAMILY = Family(
    "distillation", DISTILLATION, {"outer_el": ("expert", "learner"), "outer_le": ("learner", "expert")}
)
DELIBERATION_FAMILY = Family(
    "deliberation", DELIBERATION, {"outer_rt": ("reflector", "toolcaller"), "outer_tr": ("toolcaller", "reflector")}
)
FAMILIES = (SEQUENTIAL_FAMILY, MIXTURE_FAMILY, DISTILLATION_FAMILY, DELIBERATION_FAMILY)


@dataclass(frozen=True)
class Style:
    """One released system.

    Attributes:
        family: its pattern and link keys.
        repositories: repository name by role, and by `OUTER`.
        settings: (latent steps, rounds) by task, as recommended for MATH-500, MBPP+ and GPQA.
        math_tokens: most new tokens on mathematics.
    """

    family: Family
    repositories: dict[str, str]
    settings: dict[str, tuple[int, int]]
    math_tokens: int = 2000

    def max_new_tokens(self, task: str) -> int:
        return self.math_tokens if task == "math" else 4000


STYLES = {
    "sequential_light": Style(
        SEQUENTIAL_FAMILY,
        {
            "planner": "Sequential-Light-Planner-Qwen3-1.7B",
            "critic": "Sequential-Light-Critic-Llama3.2-1B",
            "solver": "Sequential-Light-Solver-Qwen2.5-Math-1.5B",
            OUTER: "Sequential-Light-Outerlinks",
        },
        {"math": (32, 3), "code": (48, 3), "choice": (48, 3)},
        math_tokens=1000,
    ),
    "sequential_scaled": Style(
        SEQUENTIAL_FAMILY,
        {
            "planner": "Sequential-Scaled-Planner-Gemma3-4B",
            "critic": "Sequential-Scaled-Critic-Llama3.2-3B",
            "solver": "Sequential-Scaled-Solver-Qwen3.5-4B",
            OUTER: "Sequential-Scaled-Outerlinks",
        },
        {"math": (64, 2), "code": (32, 3), "choice": (32, 2)},
    ),
    "mixture": Style(
        MIXTURE_FAMILY,
        {
            "math": "Mixture-Math-DeepSeek-R1-Distill-Qwen-1.5B",
            "code": "Mixture-Code-Qwen2.5-Coder-3B",
            "science": "Mixture-Science-BioMistral-7B",
            "summarizer": "Mixture-Summarizer-Qwen3.5-2B",
            OUTER: "Mixture-Outerlinks",
        },
        {"math": (64, 3), "code": (32, 3), "choice": (48, 3)},
    ),
    "distillation": Style(
        DISTILLATION_FAMILY,
        {
            "expert": "Distillation-Expert-Qwen3.5-9B",
            "learner": "Distillation-Learner-Qwen3.5-4B",
            OUTER: "Distillation-Outerlinks",
        },
        {"math": (64, 3), "code": (16, 2), "choice": (64, 3)},
    ),
    "deliberation": Style(
        DELIBERATION_FAMILY,
        {
            "reflector": "Deliberation-Reflector-Qwen3.5-4B",
            "toolcaller": "Deliberation-Toolcaller-Qwen3.5-4B",
            OUTER: "Deliberation-Outerlinks",
        },
        {"math": (16, 2), "code": (16, 3), "choice": (16, 3)},
    ),
}
TEMPERATURE = {"math": 0.6, "code": 0.2, "choice": 0.6}
TOP_P = 0.95


def style_named(name: str) -> Style:
    """The style of that name; ValueError lists the known ones."""
    if name not in STYLES:
        raise ValueError(f"style: {name!r} is not one of {', '.join(STYLES)}")
    return STYLES[name]
