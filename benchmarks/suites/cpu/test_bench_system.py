"""A whole sequential run of three agents against the reference algorithm's, which never caches and reloads models.

"fused" are agents as the runtime loads them on a CPU, from packed weights; the reference runs transformers' layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import PROMPTS, Setting, body_parameters
from benchmarks.harness.names import FUSED, FUSED_PLAIN, REFERENCE
from benchmarks.harness.record import Labels, Samples
from benchmarks.peers.reference_run import ReferenceRun, reference_run
from recmas import RecursiveMAS
from recmas.answering.answers import Answers
from recmas_kernels.testing import relative_error

pytestmark = pytest.mark.runtime

NO_REUSE = "fused, no prefix reuse"
RELOADING = "reference algorithm, reloading"
EQUAL = 1e-5  # of the largest entry, float32
ROUNDS = 1  # the reference algorithm takes minutes
SMALL = Setting(2, 64, 256, 12, 4, 6, 3, 3, ragged=True)


def cases(full: bool) -> list[Setting]:
    return [Setting(8, 512, 32_000, 300, 32, 32, 3, 4)] if full else [SMALL]


class Pair:
    """One system, run our way and the reference way; keeps what the last run of each gave."""

    def __init__(self, case: Setting, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.systems = {name: case.system(accelerate=name != FUSED_PLAIN) for name in (FUSED, FUSED_PLAIN)}
        self.systems[NO_REUSE] = self.systems[FUSED]
        self.systems[FUSED_PLAIN].save_pretrained(folder)
        self.answers: dict[str, Answers] = {}
        self.reference = ReferenceRun()

    def run_ours(self, name: str) -> None:
        rows = [{"question": question} for question in self.case.questions]
        self.answers[name] = self.systems[name].answer(
            rows,
            max_new_tokens=self.case.new_tokens,
            batch_size=self.case.batch,
            trace=True,
            prefix_reuse=name != NO_REUSE,
        )

    def run_reference(self) -> None:
        case = self.case
        self.reference = reference_run(self.folder, PROMPTS, case.questions, case.rounds, case.steps, case.new_tokens)

    def errors(self) -> dict[str, float]:
        """Largest relative error of a handoff, by run; the texts are equal, too, as far as the logits decide."""
        errors = {}
        for name, answers in self.answers.items():
            found = []
            for visit, truth in enumerate(self.reference.latents):
                latents = torch.stack([answer.handoffs[visit].latents for answer in answers])
                found.append(relative_error(latents, truth.double()))
            errors[name] = max(found)
            assert errors[name] <= EQUAL, f"{name}: handoffs differ by {errors[name]:.1e}"
            for row, answer in enumerate(answers):
                check_text(answer.tokens, self.reference.tokens[row].tolist(), self.reference.logits[row])
        return errors


def check_text(tokens: list[int], expected: list[int], logits: Tensor) -> None:
    """The first token that differs must be one that errors of `EQUAL` can make the largest; then texts may part."""
    assert len(tokens) == len(expected)
    for token, wanted, scores in zip(tokens, expected, logits, strict=True):
        if token != wanted:
            margin = (scores[wanted] - scores[token]).item()
            assert margin <= 2 * EQUAL * scores.abs().max().item(), f"{token} instead of {wanted}, {margin:.1e} below"
            return


def least_work(case: Setting, system: RecursiveMAS) -> floors.Work:
    """Of a whole run in which no agent reads the same beginning of a prompt twice."""
    body, width = body_parameters(system.agents[system.pattern.last]), case.features
    total = floors.Work(0, 0)
    for visit in system.pattern.visits(case.rounds):
        question_first = PROMPTS[visit.role].at(visit.round).startswith("{{question}}")
        known = case.prompt if visit.round > 1 and question_first else 0
        prompt = case.prompt + (case.steps + 2 if visit.senders else 1)
        fed = range(known, prompt + (case.new_tokens if visit.final else case.steps) - 1)
        if visit.final:
            total += floors.body_pass(body, case.layers, width, fed, case.batch, passes=case.new_tokens)
            total += floors.vocabulary_step(case.batch, width, case.vocabulary, 4) * case.new_tokens
            continue
        total += floors.body_pass(body, case.layers, width, fed, case.batch, passes=case.steps)
        total += floors.link_forward(system.inner_links[visit.role].config, case.batch, 4) * case.steps
        for (source, _), link in system.outer_links.items():
            if source == visit.role:
                total += floors.link_forward(link.config, case.batch * case.steps, 4)
    return total


def test_system(case: Setting, bench: Bench, tmp_path: Path) -> None:
    small = Pair(SMALL, tmp_path / "small")
    small.run_reference()
    for name in (FUSED, FUSED_PLAIN, NO_REUSE):
        small.run_ours(name)
    small.errors()

    pair = Pair(case, tmp_path / "system")
    errors: dict[str, float] = {}

    def settle(samples: Samples) -> Samples:
        """The timed runs must agree; the reference's counts twice, with what it loads again and again and without."""
        errors.update(pair.errors())
        return {**samples, REFERENCE: [seconds - pair.reference.loading for seconds in samples[RELOADING]]}

    bench.run(
        Labels("system", "answer", case.shape, torch.float32, "forward", case.prompt),
        {
            FUSED: partial(pair.run_ours, FUSED),
            FUSED_PLAIN: partial(pair.run_ours, FUSED_PLAIN),
            NO_REUSE: partial(pair.run_ours, NO_REUSE),
            RELOADING: pair.run_reference,
        },
        least_work(case, pair.systems[FUSED]),
        errors,
        Goal(6.0, 15.0, peer=REFERENCE),
        rounds=ROUNDS,
        weighed=(),
        twice=None,
        settle=settle,
    )
