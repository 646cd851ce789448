"""The audit: the same questions answered in several arms that differ in one thing each, compared question by question.

Each arm gives two endpoints per question: the decision, whether the metric takes the greedy answer as right, and the
NLL, minus the log probability (nats) of the gold answer's tokens in place of the answer. What follows from them stands
in `findings`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from recmas.agents.agent import Agent
from recmas.agents.targets import target_batch, target_tokens
from recmas.answering.answers import Answers
from recmas.answering.options import AnswerOptions
from recmas.answering.plan import Plan
from recmas.answering.prompt_lengths import check_lengths
from recmas.engine.messages import Prompt
from recmas.evaluation.answerer import numbered
from recmas.evaluation.data import expected_answers
from recmas.evaluation.findings import ArmResult, Audit, Outcome, decide, summed
from recmas.evaluation.interventions import ARMS, SHUFFLED, TRAINED, Arm, arm, why_left_out
from recmas.evaluation.metrics import METRICS, check_metric
from recmas.evaluation.paired import detectable_mean, detectable_share
from recmas.prompts.rows import Fields
from recmas.prompts.targets import check_target, target_text
from recmas.recursive_mas import RecursiveMAS

LEAST = 7
"""Fewer questions show no difference of decisions, even if all change sides (exact McNemar test at p <= 0.025)."""


def audit(
    system: RecursiveMAS,
    rows: Sequence[Fields],
    *,
    questions: int | None = None,
    seed: int = 0,
    metric: str = "exact",
    answer_field: str = "answer",
    arms: Sequence[str] = tuple(ARMS),
    margin: float = 0.05,
    nll_margin: float = 0.1,
    options: AnswerOptions | None = None,
    progress: bool = True,
    **changes: Any,
) -> Audit:
    """Ask whether what the latents say matters, and what does as well as they do.

    Args:
        system: what is audited; it is as it was afterwards.
        rows: questions with the fields that its templates name, and the answer. The gold text of the NLL is a row's
            target of the last agent in the last round (``targets``, as for training), else the answer.
        questions: so many rows, drawn without replacement; None takes all.
        seed: of the questions drawn, the shuffle, the noise, the random links and the bootstrap.
        metric: name of one of `METRICS`.
        answer_field: field of the row that holds the answer.
        arms: of `ARMS`; the trained and the shuffled one are always run.
        margin: difference of accuracy that counts as none.
        nll_margin: difference of NLL, in nats per answer, that counts as none.
        options: rounds, latent steps, tokens and batch size; answers are greedy, and no tools are called.
        progress: show a bar where stderr is a terminal.
        changes: fields of `AnswerOptions`, in place of those of `options`.

    Raises:
        ValueError: before any model runs: fewer than 7 rows, a row without an answer or a field of the system's
            templates, an unknown arm or metric, no latents to audit, or a batch size that is no number.
    """
    check_metric(metric)
    for name in arms:
        if name not in ARMS:
            raise ValueError(f"arms: {name!r} is not one of {', '.join(ARMS)}")
    if not (margin > 0 and nll_margin > 0):
        raise ValueError(f"margin, nll_margin: expected positive numbers, got {margin} and {nll_margin}")
    expected = expected_answers(rows, answer_field)
    options = replace(AnswerOptions.of(options, **changes), mode="latent", temperature=0.0, seed=seed, tools=())
    if options.settle is not None:
        raise ValueError("settle: an audit compares the last prompts of all questions, after as many rounds each")
    if not isinstance(options.batch_size, int):
        raise ValueError("batch_size: an audit shuffles messages within a batch, so it has to be a number")
    plan = Plan(system, options)
    senders = {role for role, _ in system.pattern.edges(plan.rounds)}
    if not any(plan.latent_steps[role] for role in senders):
        raise ValueError("system: no latents pass between its agents, so there is nothing to audit")
    system.check_rows(rows, plan.rounds)
    check_lengths(plan, rows)
    indices = _drawn(len(rows), questions, seed)
    asked = [
        _Question(index, rows[index], expected[index], _gold(rows[index], index, plan, expected[index]))
        for index in indices
    ]
    wanted = [name for name in ARMS if name in arms or name in (TRAINED, SHUFFLED)]
    left_out = {name: reason for name in wanted if (reason := why_left_out(name, system, plan.rounds))}
    run = [name for name in wanted if name not in left_out]
    results: dict[str, ArmResult] = {}
    hidden = None if progress else True
    with tqdm(total=len(run) * len(asked), desc="audit", disable=hidden, unit="question", leave=False) as bar:
        for name in run:
            bar.set_postfix_str(name, refresh=False)
            made = arm(name, system, seed)
            with made.system.packed_links():
                outcomes, seconds = _outcomes(made, asked, METRICS[metric], options, bar.update)
            trained = results[TRAINED].outcomes if results else None
            results[name] = summed(name, outcomes, trained, seconds, seed)
    pairs = list(zip(results[TRAINED].outcomes, results[SHUFFLED].outcomes, strict=True))
    verdict, reason = decide(results[SHUFFLED], margin, nll_margin)
    return Audit(
        questions=len(asked),
        indices=indices,
        rounds=plan.rounds,
        latent_steps=dict(plan.latent_steps),
        seed=seed,
        metric=metric,
        verdict=verdict,
        reason=reason,
        margin=margin,
        nll_margin=nll_margin,
        detectable_accuracy=detectable_share(len(pairs), sum(a.correct != b.correct for a, b in pairs)),
        detectable_accuracy_at_best=detectable_share(len(pairs), 0),
        detectable_nll=detectable_mean([b.nll - a.nll for a, b in pairs]),
        arms=list(results.values()),
        left_out=left_out,
    )


class _Question(NamedTuple):
    """A row and its number, the answer that the metric expects, and the text whose NLL is measured."""

    number: int
    row: Fields
    answer: str
    gold: str


def _drawn(count: int, questions: int | None, seed: int) -> list[int]:
    wanted = count if questions is None else questions
    if wanted > count:
        raise ValueError(f"questions: {wanted} were asked for, there are {count}")
    if wanted < LEAST:
        raise ValueError(
            f"questions: {wanted} are too few; fewer than {LEAST} show nothing even if every decision changes"
        )
    return sorted(random.Random(f"audit/{seed}").sample(range(count), wanted))


def _gold(row: Fields, index: int, plan: Plan, answer: str) -> str:
    """What the last agent should write: its target where the row has one, else the answer."""
    last, targets = plan.system.pattern.last, row.get("targets")
    if not (isinstance(targets, Mapping) and last in targets):
        return answer
    check_target(row, index, last, plan.rounds)
    return target_text(row, index, last, plan.rounds)


def _batches(count: int, size: int) -> list[range]:
    """Parts of nearly equal size; each holds two questions or more, that there is another one to take messages of."""
    parts = max(1, min(-(-count // size), count // 2))
    return [range(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


def _outcomes(
    made: Arm,
    asked: Sequence[_Question],
    metric: Callable[[str, str], bool],
    options: AnswerOptions,
    progress: Callable[[int], object],
) -> tuple[list[Outcome], float]:
    """All questions in one arm, and the seconds that their answers took."""
    system, last = made.system, made.system.pattern.last
    outcomes: list[Outcome] = []
    seconds = 0.0
    for batch in _batches(len(asked), int(options.batch_size or 1)):
        part = [asked[index] for index in batch]
        order: list[int] = []

        def note(numbers: Sequence[int], answers: Answers, order: list[int] = order) -> None:
            order[:] = numbers  # of the batch's rows, as they lie in its prompts

        rows = [question.row for question in part]
        changed = replace(options, batch_size=len(part), **made.changes)
        with numbered([question.number for question in part], len(asked)):
            answers = system.answer(rows, changed, on_message=made.on_message, on_answers=note)
        prompt = system.final_prompt
        assert prompt is not None, "the last visit assembles its prompt through the system"
        system.load_weights(last)
        try:
            found = gold_nll(system.agents[last], prompt, [part[number].gold for number in order])
        finally:
            system.unload_weights()
        nll = dict(zip(order, found, strict=True))
        for number, (question, answer) in enumerate(zip(part, answers, strict=True)):
            outcomes.append(Outcome(answer.text, metric(answer.text, question.answer), nll[number]))
        seconds += sum(answers.seconds.values())
        progress(len(part))
    return outcomes, seconds


@torch.no_grad()
def gold_nll(agent: Agent, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """By row, minus the log probability (nats) of this text's tokens behind the agent's prompt."""
    tokens = [row[:-1] for row in target_tokens(agent, texts)]  # without the end, which completions never write
    ids, mask = target_batch(agent, tokens)
    hidden = agent.hidden(prompt, ids, mask)
    losses = []
    for row, said in enumerate(tokens):  # one row's logits at a time
        logits = agent.logits(hidden[row, : len(said)]).float()
        losses.append(F.cross_entropy(logits, ids[row, : len(said)], reduction="sum").item())
    return losses
