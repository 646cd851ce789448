"""What an audit finds: every question in every arm, the differences from the trained arm, and the verdict.

The verdict compares the system with itself where every message is that of another question: that leaves prompts, links,
number and statistics of the latents alone, and takes away what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recmas.evaluation.intervals import wilson
from recmas.evaluation.paired import Difference, paired_means, paired_shares
from recmas.evaluation.summary import Estimate

MATTERS, DOES_NOT, UNKNOWN = "content matters", "content does not matter", "cannot be told with {} questions"
HEADS = ("arm", "accuracy", "NLL", "changed", "Δ accuracy", "p", "Δ NLL", "ms")


@dataclass(frozen=True)
class Outcome:
    """One question in one arm: what was written, whether it is right, and the NLL of the gold answer in nats."""

    text: str
    correct: bool
    nll: float


@dataclass(frozen=True)
class ArmResult:
    """All questions in one arm.

    Attributes:
        arm: its name (`ARMS`).
        accuracy: share of right answers, with Wilson's 95 % interval; nll: mean.
        changed: share of questions whose answer is another text than the trained arm's.
        accuracy_difference, nll_difference: this arm minus the trained one, paired, with 97.5 % intervals; None for
            the trained arm itself.
        seconds: per question, without the NLL.
        outcomes: by question.
    """

    arm: str
    accuracy: Estimate
    nll: float
    changed: float
    accuracy_difference: Difference | None
    nll_difference: Difference | None
    seconds: float
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        questions: how many; indices: which rows these are.
        rounds, latent_steps: of the run, the latter by role.
        seed, metric: as asked for.
        verdict: "content matters", "content does not matter" or "cannot be told with N questions".
        reason: the numbers that the verdict follows from.
        margin, nll_margin: differences that count as none.
        detectable_accuracy, detectable_nll: the smallest true differences between the trained and the shuffled arm that
            so many questions show with a chance of 80 %, where verdicts and NLLs vary as here;
            detectable_accuracy_at_best: the same where all verdicts that change change one way.
        arms: in order; left_out: why others were not run, by name.
    """

    questions: int
    indices: list[int]
    rounds: int
    latent_steps: dict[str, int]
    seed: int
    metric: str
    verdict: str
    reason: str
    margin: float
    nll_margin: float
    detectable_accuracy: float
    detectable_accuracy_at_best: float
    detectable_nll: float
    arms: list[ArmResult]
    left_out: dict[str, str]


def summed(
    name: str, outcomes: list[Outcome], trained: Sequence[Outcome] | None, seconds: float, seed: int
) -> ArmResult:
    """All questions in one arm together.

    Args:
        name: of the arm.
        outcomes: by question.
        trained: those of the trained arm; None for that arm itself.
        seconds: of all answers.
        seed: of the bootstrap.
    """
    right = sum(one.correct for one in outcomes)
    compared = trained or outcomes
    decision = cost = None
    if trained is not None:
        decision = paired_shares([one.correct for one in trained], [one.correct for one in outcomes])
        cost = paired_means([one.nll for one in trained], [one.nll for one in outcomes], seed)
    return ArmResult(
        name,
        Estimate(right / len(outcomes), *wilson(right, len(outcomes))),
        sum(one.nll for one in outcomes) / len(outcomes),
        sum(a.text != b.text for a, b in zip(compared, outcomes, strict=True)) / len(outcomes),
        decision,
        cost,
        seconds / len(outcomes),
        outcomes,
    )


def decide(shuffled: ArmResult, margin: float, nll_margin: float) -> tuple[str, str]:
    """The verdict, and the numbers that it follows from."""
    decision, cost = shuffled.accuracy_difference, shuffled.nll_difference
    assert decision is not None
    assert cost is not None
    if decision.within(margin) and cost.within(nll_margin):
        verdict = DOES_NOT
    elif decision.shown or cost.shown:
        verdict = MATTERS
    else:
        verdict = UNKNOWN.format(len(shuffled.outcomes))
    reason = (
        f"with the messages of another question, accuracy changes by {decision.value:+.3f} [{decision.low:+.3f}, "
        f"{decision.high:+.3f}] (McNemar p = {decision.p:.2g}) and the NLL of the gold answer by {cost.value:+.3f} "
        f"[{cost.low:+.3f}, {cost.high:+.3f}] nats"
    )
    return verdict, reason


def table(found: Audit) -> str:
    """A line per arm under a line of headings, then what was left out, what can be seen, and the verdict."""
    lines = [HEADS, *map(columns, found.arms)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"left out: {name}, because {reason}" for name, reason in found.left_out.items()]
    steps = ", ".join(f"{role}={count}" for role, count in found.latent_steps.items())
    text.append(f"{found.questions} questions, {found.rounds} rounds, latent steps {steps}, metric {found.metric}")
    text.append(
        f"smallest difference that shows with a chance of 80 %: {found.detectable_accuracy:.3f} in accuracy "
        f"({found.detectable_accuracy_at_best:.3f} if all changes go one way), {found.detectable_nll:.3f} nats"
    )
    text.append(f"verdict: {found.verdict}: {found.reason}")
    return "\n".join(text)


def columns(one: ArmResult) -> tuple[str, ...]:
    """An arm's line of a table, under `HEADS`."""
    decision, cost = one.accuracy_difference, one.nll_difference
    return (
        one.arm,
        f"{one.accuracy.value:.3f} [{one.accuracy.low:.3f}, {one.accuracy.high:.3f}]",
        f"{one.nll:.3f}",
        f"{one.changed:.3f}",
        "" if decision is None else f"{decision.value:+.3f} [{decision.low:+.3f}, {decision.high:+.3f}]",
        "" if decision is None else f"{decision.p:.2g}",
        "" if cost is None else f"{cost.value:+.3f} [{cost.low:+.3f}, {cost.high:+.3f}]",
        f"{1000 * one.seconds:.1f}",
    )
