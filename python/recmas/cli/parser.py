"""The parser all commands share: one-line errors, exit status 2, and option types with readable names."""

from __future__ import annotations

import os
import re
import sys
from argparse import Action, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the paragraphs of descriptions; names a default once, and none where there is none."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        written = action.help or ""
        if action.default in (None, False) or "(default: " in written:
            added = text.removeprefix(written)
            text = written + re.sub(r"(, )?default: %\(default\)s", "", added).replace(" ()", "")
        return text


class CommandLineParser(ArgumentParser):
    """A jsonargparse parser whose errors are one line on stderr and exit status 2.

    Attributes:
        words: what it will be asked to parse.
    """

    def __init__(self, words: Sequence[str] = (), **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)
        self.words = words

    def add_commands(
        self, dest: str, summaries: Mapping[str, str], add_options: Callable[[str, CommandLineParser], None]
    ) -> None:
        """Subcommands, one of which must be named.

        Args:
            dest: where the name of the chosen one goes; in capitals it stands in usages.
            summaries: of the commands, by name.
            add_options: called with the chosen name and its parser alone: making options takes longer than parsing.
        """
        commands = self.add_subcommands(required=True, dest=dest, metavar=dest.upper())
        chosen = next((word for word in self.words if word in summaries), None)
        for name, summary in summaries.items():
            words = self.words[self.words.index(name) + 1 :] if name == chosen else ()
            command = CommandLineParser(words, description=f"{summary[0].upper()}{summary[1:]}.")
            commands.add_subcommand(name, command, help=summary)
            if name == chosen:
                add_options(name, command)

    def add_argument(self, *names: Any, **options: Any) -> Action:
        """As argparse's; positional arguments stand in capitals in usages and errors."""
        if not names[0].startswith("-"):
            options.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"recmas: error: {_readable(self._in_words(message))}", file=sys.stderr)
        sys.exit(2)

    def _in_words(self, message: str) -> str:
        """The message about what is missing, named as the usage does."""
        if required := re.fullmatch(r"the following arguments are required: (.+)", message):
            missing = (self._action(key) for key in required.group(1).split(", "))
            names = (action.option_strings[-1] if action.option_strings else str(action.metavar) for action in missing)
            return f"required: {', '.join(names)}"
        if left_out := re.match(r'expected "([\w.]+)" to be one of .+, but it was not provided', message):
            action = self._action(left_out.group(1))
            return f"required: {action.metavar}, one of {', '.join(action.choices or ())}"
        return message

    def _action(self, key: str) -> Action:
        """The argument of a dotted key, "train.inner.data"; its parts but the last are subcommands."""
        head, dot, rest = key.partition(".")
        for action in self._actions:
            if dot and isinstance(action.choices, dict) and head in action.choices:
                command: CommandLineParser = action.choices[head]
                return command._action(rest)
            if action.dest == key:
                return action
        raise KeyError(key)


class WrongValue(ArgumentTypeError, ValueError):
    """Told in its own words: argparse keeps the first kind's, and whoever reads a configuration file the second's."""


class Kind:
    """An option type: a function from what was written (or stood in YAML) to a value, and how help calls it."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.__name__ = name
        self._read = read

    def __call__(self, value: Any) -> Any:
        return self._read(value)

    def __repr__(self) -> str:
        return self.__name__


def whole(value: Any) -> int:
    """An integer as it was written, or as it stood in YAML; a float is none."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{value!r} is not an integer")
    return int(value)


def _read_steps(value: Any) -> int | dict[str, int]:
    if isinstance(value, dict) or (isinstance(value, str) and "=" in value):
        return {role: whole(count) for role, count in read_pairs(value).items()}
    return whole(value)


def _read_rounds(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    try:
        rounds = whole(value)
    except ValueError:
        raise WrongValue(f"must be an integer or auto, got {value!r}") from None
    if rounds < 1:
        raise WrongValue(f"must be at least 1, got {rounds}")
    return rounds


def _read_by_role(value: Any) -> str | dict[str, str]:
    return read_pairs(value) if isinstance(value, dict) or "=" in value else str(value)


def _read_batch_size(value: Any) -> int | str:
    size = value if value == "auto" else whole(value)
    if size != "auto" and size < 1:
        raise ValueError(f"{size} is not positive")
    return size


def several(value: Any) -> Sequence[Any]:
    """What was written between commas, or stood in YAML as a list or as a single value."""
    return value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]


def _read_names(value: Any) -> list[str]:
    return [str(name).strip() for name in several(value)]


def some_of(names: Sequence[str]) -> Kind:
    """The kind of option that takes one or several of these names."""

    def read(value: Any) -> tuple[str, ...]:
        found = tuple(_read_names(value))
        for name in found:
            if name not in names:
                raise ValueError(f"{name!r} is not one of {', '.join(names)}")
        return found

    return Kind(f"{'|'.join(names)},...", read)


def _read_counts(value: Any) -> tuple[int, ...]:
    return tuple(whole(count) for count in several(value))


def _read_weights(value: Any) -> tuple[float, ...]:
    weights = several(value)
    if any(isinstance(weight, bool) for weight in weights):
        raise ValueError(f"{value!r} is not a list of numbers")
    return tuple(float(weight) for weight in weights)


def read_pairs(value: Any) -> dict[str, str]:
    """``ROLE=VALUE,ROLE=VALUE`` (or a mapping) as a dict."""
    if isinstance(value, dict):
        return {str(role): str(item) for role, item in value.items()}
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(role and sign for role, sign, _ in pairs):
        raise ValueError(f"{value!r} is not of the form ROLE=VALUE,...")
    return {role.strip(): item.strip() for role, _, item in pairs}


BATCH_SIZE = Kind("N or auto", _read_batch_size)
DEVICES = Kind("DEVICE or ROLE=DEVICE,...", _read_by_role)
ROUNDS = Kind("N or auto", _read_rounds)
LATENT_STEPS = Kind("N or ROLE=N,...", _read_steps)
NAMES = Kind("NAME,...", _read_names)
COUNTS = Kind("N,...", _read_counts)
COLUMNS = Kind("FIELD=COLUMN,...", read_pairs)
ROLES = Kind("ROLE or ROLE=ROLE,...", _read_by_role)
WEIGHTS = Kind("NUMBER,...", _read_weights)
PAIRS = Kind("ROLE=VALUE,...", read_pairs)


def one_line(error: BaseException) -> str:
    """An exception's message on one line; the system's own errors as FILE: what happened.

    A message may quote a file that nobody vouches for: what a terminal would obey is written as an escape.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return visible(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return visible(re.sub(r"\s*\n\s*", " ", str(error).strip())) or type(error).__name__


def visible(text: str) -> str:
    """A text in which what is not printable is written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _readable(message: str) -> str:
    """jsonargparse's message without its inner names and line breaks."""
    line = visible(re.sub(r"\s*\n\s*", " ", message.strip()))
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
    for kind, least in (("PositiveInt", 1), ("NonNegativeInt", 0)):
        line = re.sub(rf"Not of type {kind}: (\S+) does not conform to .*", rf"must be at least {least}, got \1", line)
        line = re.sub(rf"Not of type {kind}: invalid literal .*: (.+)", r"must be an integer, got \1", line)
    return re.sub(r'Parser key "([\w.]+)":', lambda key: f"--{key.group(1).replace('_', '-')}:", line)
