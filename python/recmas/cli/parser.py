"""The parser all commands share: one-line errors, exit status 2, and option types with readable names."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the paragraphs of descriptions."""


class CommandLineParser(ArgumentParser):
    """A jsonargparse parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"recmas: error: {_readable(message)}", file=sys.stderr)
        sys.exit(2)


class Kind:
    """An option type: a function from what was written (or stood in YAML) to a value, and how help calls it."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.__name__ = name
        self._read = read

    def __call__(self, value: Any) -> Any:
        return self._read(value)

    def __repr__(self) -> str:
        return self.__name__


def _read_steps(value: Any) -> int | dict[str, int]:
    if not isinstance(value, str):
        return value
    if "=" not in value:
        return int(value)
    return {role: int(count) for role, count in read_pairs(value).items()}


def _read_names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def _read_counts(value: Any) -> tuple[int, ...]:
    counts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    return tuple(int(count) for count in counts)


def read_pairs(value: Any) -> dict[str, str]:
    """``ROLE=VALUE,ROLE=VALUE`` (or a mapping) as a dict."""
    if isinstance(value, dict):
        return {str(role): str(item) for role, item in value.items()}
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(role and sign for role, sign, _ in pairs):
        raise ValueError(f"{value!r} is not of the form ROLE=VALUE,...")
    return {role.strip(): item.strip() for role, _, item in pairs}


LATENT_STEPS = Kind("N or ROLE=N,...", _read_steps)
NAMES = Kind("NAME,...", _read_names)
COUNTS = Kind("N,...", _read_counts)
PAIRS = Kind("ROLE=VALUE,...", read_pairs)


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__


def _readable(message: str) -> str:
    """jsonargparse's message without its inner names and line breaks."""
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
    return re.sub(r'Parser key "([\w.]+)":', lambda key: f"--{key.group(1).replace('_', '-')}:", line)
