"""Rows of questions from JSON lines. No torch here, so that a broken file is an error at once."""

from __future__ import annotations

import io
import os
from pathlib import Path

from recmas.files.reading import open_regular, parse_json


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Rows of a JSONL file (blank lines are skipped).

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: a line is not a JSON object (names file and line), the file is no regular one, is not UTF-8 or holds
            no rows.
    """
    rows: list[dict[str, object]] = []
    try:
        if Path(path).is_dir():
            raise IsADirectoryError
        with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
                rows.append(row)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected a JSONL file, a JSON object per line") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: is a folder; expected a JSONL file, a JSON object per line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows
