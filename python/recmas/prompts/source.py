"""Rows from a file or from the hub. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from recmas.files.reading import check_regular
from recmas.prompts.jsonl import read_rows

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_ENDINGS = (".jsonl", ".json", ".txt", ".gz")


def read_source(source: str, split: str, subset: str | None = None) -> list[dict[str, object]]:
    """Rows of a JSONL or parquet file, or of a data set on the hub where `source` is ``owner/name`` and no such file.

    Args:
        source: path or hub id; what ends in ``.parquet`` is read as parquet.
        split: of the hub's data set.
        subset: of the hub's data set; None is its only one.

    Raises:
        ValueError: a broken file or data set, or no rows.
        FileNotFoundError: no such file, where the source cannot be a hub id.
        ImportError: a hub id or a parquet file without the [eval] or the [train] extra.
    """
    if source.endswith(".parquet"):
        return _from_parquet(Path(source))
    if Path(source).exists() or source.endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(source):
        return read_rows(source)
    return _from_hub(source, split, subset)


def with_columns(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], source: str
) -> list[dict[str, object]]:
    """Rows with fields of other names: ``{field: column}``; other columns stay.

    Args:
        rows: as they were read.
        columns: a column by the field that it becomes; ``targets.ROLE`` is what ROLE should say.
        source: begins messages.

    Raises:
        ValueError: a row lacks a column.
    """
    made = []
    for index, row in enumerate(rows):
        new = dict(row)
        for field, column in columns.items():
            if column not in row:
                known = ", ".join(sorted(row)) or "none"
                raise ValueError(f"{source}: row {index}: no column {column!r} for {field!r}; it has {known}")
            outer, dot, inner = field.partition(".")
            if dot:
                held = new.get(outer)
                new[outer] = {**(held if isinstance(held, Mapping) else {}), inner: row[column]}
            else:
                new[field] = row[column]
        made.append(new)
    return made


def _from_parquet(path: Path) -> list[dict[str, object]]:
    try:
        check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ImportError(f"{path}: a parquet file needs pyarrow: pip install 'recmas-kernels[train]'") from None
    try:
        rows: list[dict[str, object]] = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows")
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
