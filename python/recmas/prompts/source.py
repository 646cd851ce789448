"""Rows from a file or from the hub. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from recmas.prompts.jsonl import read_rows

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_ENDINGS = (".jsonl", ".json", ".txt")


def read_source(source: str, split: str, subset: str | None = None) -> list[dict[str, object]]:
    """Rows of a JSONL file, or of a data set on the hub where `source` is ``owner/name`` and no such file exists.

    Args:
        source: path or hub id.
        split, subset: of the hub's data set; None is its only subset.

    Raises:
        ValueError: a broken file or data set, or no rows.
        FileNotFoundError: no such file, where the source cannot be a hub id.
        ImportError: a hub id without the [eval] or the [train] extra.
    """
    if Path(source).exists() or source.endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(source):
        return read_rows(source)
    return _from_hub(source, split, subset)


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
