"""Files of questions, however they were written."""

from __future__ import annotations

import gzip
import os

import pytest

from recmas.prompts.jsonl import read_rows

TEXT = '{"question": "fox"}\n\n{"question": "d\u00f6g", "n": 1.5}\n'
ROWS = [{"question": "fox"}, {"question": "d\u00f6g", "n": 1.5}]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_encodings_of_the_same_rows(tmp_path, ends, mark, pack):
    path = tmp_path / "rows"
    path.write_bytes(pack(mark + TEXT.replace("\n", ends).encode()))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(TEXT.encode("utf-16"), "rows: not UTF-8 text", id="UTF-16"),
        pytest.param(gzip.compress(TEXT.encode())[:-10], "rows: is a damaged gzip file: ", id="cut gzip"),
        pytest.param(gzip.compress(TEXT.encode())[:-8] + bytes(8), "rows: is a damaged gzip file: ", id="wrong sum"),
        pytest.param(b"\x1f\x8b", "rows: is a damaged gzip file: ", id="two bytes of gzip"),
        pytest.param(
            b'{"a": 1}\n{"b": 1, "c": {"a": 2, "a": 2}}',
            r"rows, line 2: not valid JSON \('a' occurs twice in one object\)",
            id="a field twice",
        ),
        pytest.param(b'{"a": NaN}', r"rows, line 1: not valid JSON \(NaN is not a JSON number\)", id="NaN"),
        pytest.param(b"[1]", "rows, line 1: expected a JSON object, got list", id="a list"),
        pytest.param(b"\xef\xbb\xbf", "rows: holds no rows", id="nothing but a mark"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, content, message):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        read_rows(tmp_path / "rows")
    assert len(str(told.value).splitlines()) == 1


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(ValueError, match="rows: is a FIFO, expected a regular file"):
        read_rows(tmp_path / "rows")
