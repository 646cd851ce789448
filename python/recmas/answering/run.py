"""A plan over rows: everything is checked before any model runs, then batches of similar length are answered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch

from recmas.answering.answers import Answer, Answers, RowError, RowsFailedError
from recmas.answering.batch import Batch, RowsTooLongError
from recmas.answering.batching import Batches, batches
from recmas.answering.plan import Plan
from recmas.answering.prompt_lengths import check_lengths
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.prompts.rows import Fields, read_row

Question = str | Mapping[str, object] | Sequence[Mapping[str, str]]
"""A question, the fields that the templates name, or a chat."""


def answer(plan: Plan, rows: Iterable[Question]) -> Answers:
    """Run `plan` over `rows` in batches of rows of similar length; see `RecursiveMAS.answer`."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise ValueError(f"rows: a single {type(rows).__name__}, expected a list of questions")
    fields = _checked(plan, rows)
    # For the run alone, so that the next one sees what nobody counts; under offload no device has room to spare.
    keeps = plan.options.prefix_reuse and plan.system.offloader is None
    constants = ConstantPrefixes(plan.system.states) if keeps else None
    answers, queue = Answers(Answer() for _ in fields), batches(plan, fields, constants)
    try:
        with plan.system.packed_links():
            _answer(plan, fields, queue, constants, answers)
    finally:
        plan.system.unload_weights()
    return answers


def _answer(
    plan: Plan, fields: Sequence[Fields], queue: Batches, constants: ConstantPrefixes | None, answers: Answers
) -> None:
    visits = len(list(plan.system.pattern.visits(plan.rounds)))
    advance: Callable[[int], object] = plan.progress or (lambda rows: None)
    failed: dict[int, Exception] = {}
    for numbers in queue:
        if all(number in plan.skip for number in numbers):
            advance(len(numbers) * visits)
            continue
        several, left = len(numbers) < len(fields), [number for number in numbers if number not in failed]
        while left:
            part = Answers(Answer() for _ in left)
            batch, shown = Batch(plan, part, fields, left, constants if several else None), False
            try:
                for row, piece in batch.run(in_pieces=plan.on_text is not None):
                    assert plan.on_text is not None
                    shown = True
                    plan.on_text(row, piece)
            except torch.OutOfMemoryError:
                if shown or not queue.halve():  # text that was shown cannot be taken back
                    raise
                if constants is not None:
                    constants.clear()
                advance(-batch.visited)
                break
            except RowsTooLongError as error:  # once more without these rows, on which no other one depends
                failed |= {number: RowError(problem) for number, problem in error.rows.items()}
                if shown:
                    raise RowsFailedError(answers, failed) from error
                advance(visits * len(error.rows) - batch.visited)
                left = [number for number in left if number not in error.rows]
            else:
                answers.fill(part, left)
                if plan.on_answers is not None:
                    plan.on_answers(left, part)
                break
    if failed:
        raise RowsFailedError(answers, failed)


def check(plan: Plan, rows: Iterable[Question]) -> None:
    """Raise ValueError if a row lacks a field that a template of the run names, or does not fit an agent's context."""
    _checked(plan, rows)


def stream(plan: Plan, row: Question) -> Generator[str, None, Answer]:
    """Run `plan` on one row; see `RecursiveMAS.stream`. Everything is checked before the first piece is asked for."""
    fields = _checked(plan, [row])

    def pieces() -> Generator[str, None, Answer]:
        answers = Answers([Answer()])
        try:
            with plan.system.packed_links():
                for _, piece in Batch(plan, answers, fields, [0]).run(in_pieces=True):
                    if plan.on_text is not None:
                        plan.on_text(0, piece)
                    yield piece
        finally:
            plan.system.unload_weights()
        return answers[0]

    return pieces()


def _checked(plan: Plan, rows: Iterable[Question]) -> list[Fields]:
    fields = [read_row(row, index) for index, row in enumerate(rows)]
    plan.system.check_rows(fields, plan.rounds)
    check_lengths(plan, fields)
    return fields
