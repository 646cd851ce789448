"""Questions with their answers, from a file or from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from recmas.prompts.jsonl import read_rows

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_ENDINGS = (".jsonl", ".json", ".txt")


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
        split, subset: of the hub's data set; None is its only subset.
        question_field: field of a row that becomes its "question".
        limit: the first so many rows; None is all.

    Raises:
        ValueError: a broken file or data set, no rows, or a row without the field.
        FileNotFoundError: no such file, where the source cannot be a hub id.
        ImportError: a hub id without the [eval] extra.
    """
    if Path(source).exists() or source.endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(source):
        rows = read_rows(source)
    else:
        rows = _from_hub(source, split, subset)
    rows = rows[:limit]
    if question_field != "question":
        for index, row in enumerate(rows):
            if question_field not in row:
                raise ValueError(f"row {index}: no field {question_field!r} with the question")
            row["question"] = row[question_field]
    return rows


def _from_hub(source: str, split: str, subset: str | None) -> list[dict[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"no file {source!r}, and a data set of the hub needs datasets: pip install 'recmas-kernels[eval]'"
        ) from None
    try:
        rows = [dict(row) for row in load_dataset(source, subset, split=split)]
    except Exception as error:  # datasets, the hub and their file readers each raise their own
        raise ValueError(f"data set {source!r}: split {split!r} cannot be loaded: {error}") from error
    if not rows:
        raise ValueError(f"data set {source!r}: split {split!r} holds no rows")
    return rows
