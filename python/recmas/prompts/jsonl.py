"""Rows of questions from JSON lines. No torch here, so that a broken file is an error at once."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from recmas.files.reading import open_regular, parse_json

_GZIP = b"\x1f\x8b"  # how a gzip file begins


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Rows of a JSONL file, UTF-8, with or without a byte order mark, gzip or plain; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: a line is not a JSON object (names file and line), the file is no regular one, is not UTF-8, is cut
            short or holds no rows.
    """
    rows: list[dict[str, object]] = []
    try:
        if Path(path).is_dir():
            raise IsADirectoryError
        with _opened(Path(path)) as file:
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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: is a damaged gzip file: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The file's text, unpacked."""
    with open_regular(path) as file:
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        with io.TextIOWrapper(gzip.GzipFile(fileobj=file) if packed else file, encoding="utf-8-sig") as text:
            yield text
