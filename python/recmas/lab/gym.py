"""Questions that nobody here wrote: those of reasoning-gym, dealt out to a reader and a solver as in the notes task.

The reader has what a question is about, the solver the question alone. As in `recmas.lab.notes` the message ends a
sentence whose beginning both know, and begins with what was asked for. reasoning-gym (the [gym] extra) draws the
questions; the prompts, with three examples of it, are this project's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recmas.config.system_json import PromptSpec
from recmas.prompts.targets import target_text

EXAMPLES = 3
"""In the prompts, drawn under a split of their own."""
MOST = 1_000_000
"""Questions of a seed."""


@dataclass(frozen=True)
class Task:
    """A data set of reasoning-gym.

    Attributes:
        settings: of its questions.
        dealt: the last line of an item's text and its metadata, to the question, the beginning of the message that both
            know, and how the message ends behind the answer.
        kept: whether an item, by its answer, is a question of this task.
    """

    settings: Mapping[str, Any]
    dealt: Callable[[str, Mapping[str, Any]], tuple[str, str, str]]
    kept: Callable[[str], bool] = bool


def _needle(asked: str, metadata: Mapping[str, Any]) -> tuple[str, str, str]:
    does = asked.partition("?")[0].removeprefix("Who ")
    return f"Who {does}?", f"The one who {does} is", "."


def _family(asked: str, metadata: Mapping[str, Any]) -> tuple[str, str, str]:
    first, second = metadata["person1"], metadata["person2"]
    return f"What relation is {first} to {second}?", f"{first} is the", f" of {second}."


_TURNED = ("niece", "nephew", "mother-in-law", "father-in-law")
"""Answers of release 0.1 that name the second person's relation to the first, or its sex."""
TASKS = {
    "needle_haystack": Task({"min_num_statements": 4, "max_num_statements": 6}, _needle),
    "family_relationships": Task(
        {"min_family_size": 4, "max_family_size": 6}, _family, lambda answer: answer not in _TURNED
    ),
}
"""By their names there: whose statement is it, of 4 to 6; and how are two people related, which has to be inferred."""


def questions(task: str, split: str, seed: int, count: int) -> list[dict[str, object]]:
    """`count` rows with the fields of the notes task.

    A row depends on (task, split, seed, its number) and on the release of reasoning-gym alone.

    Raises:
        ValueError: an unknown task, or more rows than it has.
        ImportError: reasoning-gym is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise ImportError("questions of reasoning-gym need it: pip install 'recmas-kernels[gym]'") from None
    drawn = random.Random(f"gym/{task}/{split}/{seed}").getrandbits(31)
    items = create_dataset(task, size=MOST, seed=drawn, **TASKS[task].settings)
    kept = (item for item in items if TASKS[task].kept(item["answer"]))
    rows = [_row(task, item) for item in itertools.islice(kept, count)]
    if len(rows) < count:
        raise ValueError(f"count: a seed of {task} has {len(rows)} questions, got {count}")
    return rows


def _row(task: str, item: Mapping[str, Any]) -> dict[str, object]:
    notes, _, asked = item["question"].strip().rpartition("\n")
    question, lead, end = TASKS[task].dealt(asked, item["metadata"])
    answer = item["answer"]
    return {
        "question": question,
        "lead": lead,
        "reader_notes": " ".join(notes.split()),
        "answer": answer,
        "task": task,
        "targets": {"reader": f" {answer}{end}", "solver": f" {answer}"},
    }


def prompts(task: str) -> dict[str, PromptSpec]:
    """Plain completions after three examples, by role, for `recmas.lab.notes.notes_system`."""
    reader, solver = "", ""
    for number, row in enumerate(questions(task, "examples", 0, EXAMPLES)):
        told = f"{row['lead']}{target_text(row, number, 'reader', 1)}"
        reader += f"Notes: {row['reader_notes']}\nQuestion: {row['question']}\nMessage: {told}\n\n"
        solver += f"Message: {told}\nQuestion: {row['question']}\nAnswer: {row['answer']}\n\n"
    reader += "Notes: {{reader_notes}}\nQuestion: {{question}}\nMessage: {{lead}}"
    solver += "Message: {{lead}}{{from:reader}}\nQuestion: {{question}}\nAnswer:"
    return {"reader": PromptSpec(reader), "solver": PromptSpec(solver)}
