"""API keys: read from a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

from recmas.files.reading import check_regular

LEAST = 16
"""Characters of a key: fewer could be guessed."""


class ApiKeys:
    """The keys that are let in.

    Args:
        path: a file with a key per line; empty lines and lines that begin with # are passed over.

    Raises:
        ValueError: a file that is missing, that others may read, or without usable keys; names the line, not the key.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        if os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
            raise ValueError(f"{path}: others may read these keys; chmod 600 {path}")
        try:
            lines = path.read_bytes().decode("ascii").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not ASCII") from None
        self._digests: list[bytes] = []
        for number, line in enumerate(lines, start=1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if len(key) < LEAST or not key.isprintable() or " " in key:
                raise ValueError(f"{path}, line {number}: expected a key of at least {LEAST} characters without spaces")
            self._digests.append(_digest(key))
        if not self._digests:
            raise ValueError(f"{path}: holds no key")

    def accept(self, key: str) -> bool:
        """Whether `key` is one of them; takes equally long for every key of its length."""
        digest, found = _digest(key), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
