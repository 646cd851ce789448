"""Questions with their answers, from a file or from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recmas.prompts.rows import Fields, text_of
from recmas.prompts.source import read_source


def read_data(
    source: str,
    *,
    split: str = "test",
    subset: str | None = None,
    question_field: str = "question",
    limit: int | None = None,
) -> list[dict[str, object]]:
    """Rows of a JSONL file, or of a data set on the hub where `source` is ``owner/name`` and no such file exists.

    Args:
        source: path or hub id.
        split: of the hub's data set.
        subset: of the hub's data set; None is its only one.
        question_field: field of a row that becomes its "question".
        limit: the first so many rows; None is all.

    Raises:
        ValueError: a broken file or data set, no rows, or a row without the field.
        FileNotFoundError: no such file, where the source cannot be a hub id.
        ImportError: a hub id without the [eval] or the [train] extra.
    """
    rows = read_source(source, split, subset)[:limit]
    if question_field != "question":
        for index, row in enumerate(rows):
            if question_field not in row:
                raise ValueError(f"row {index}: no field {question_field!r} with the question")
            row["question"] = row[question_field]
    return rows


def expected_answers(rows: Sequence[Fields], field: str) -> list[str]:
    """The answer of every row, from the field that holds it.

    Raises:
        ValueError: no rows, or a row without an answer; names the row and the field.
    """
    if not rows:
        raise ValueError("rows: expected at least one question, got none")
    return [_expected(row, index, field) for index, row in enumerate(rows)]


def _expected(row: Fields, index: int, field: str) -> str:
    if not isinstance(row, Mapping) or field not in row:
        raise ValueError(f"row {index}: no field {field!r} with the answer")
    answer = "" if row[field] is None else text_of(row[field], f"row {index}: field {field!r}")
    if not answer.strip():
        raise ValueError(f"row {index}: field {field!r} is empty; any text without an answer would count as right")
    return answer
