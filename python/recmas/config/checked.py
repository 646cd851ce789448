"""JSON of a file, key by key: values of the right types, no unknown key, none that is missing. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recmas.files.reading import shown

MAX_PATH = 1024
"""Characters of a path: a downloaded file cannot name a longer one."""

_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class Checked:
    """Checks every key of one file; errors are one line: file, key, what it was, what was expected."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {key if len(key) <= 200 else key[:197] + '...'}: {problem}")

    def typed(self, value: Any, kind: type, key: str) -> Any:
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"{shown(value)} is not {_NAMES[kind]}")
        return float(value) if kind is float else value

    def name(self, value: Any, key: str) -> str:
        """A path, or a hub id."""
        text = str(self.typed(value, str, key))
        if not 0 < len(text) <= MAX_PATH or not text.isprintable():
            raise self.fail(key, f"{shown(text)} is no path of 1 to {MAX_PATH} printable characters")
        return text

    def table(self, value: Any, key: str, required: Mapping[str, type], optional: Mapping[str, type]) -> dict[str, Any]:
        """`value` as an object with exactly these keys; a null counts as absent."""
        known = {**required, **optional}
        prefix = f"{key}." if key else ""
        table = without_none(self.typed(value, dict, key or "the file"))
        for name in table:
            if name not in known:
                raise self.fail(f"{prefix}{name}", f"unknown key, expected {', '.join(known)}")
        for name in required:
            if name not in table:
                raise self.fail(f"{prefix}{name}", "missing key")
        return {name: self.typed(item, known[name], f"{prefix}{name}") for name, item in table.items()}

    def build(self, key: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def between(self, table: Mapping[str, Any], name: str, least: int, most: int, key: str) -> None:
        value = table.get(name, least)
        if value < least:
            raise self.fail(f"{key}.{name}", f"{value} is less than {least}")
        if value > most:
            raise self.fail(f"{key}.{name}", f"{value} is more than {most}")


def without_none(described: Mapping[str, Any]) -> dict[str, Any]:
    """An object without the keys whose value is None."""
    return {key: value for key, value in described.items() if value is not None}
