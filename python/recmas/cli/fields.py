"""Options made of a dataclass: one per field, explained by its docstring, so that a new field is written once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from recmas.cli.parser import CommandLineParser

SWITCH_OFF = object()
"""Kind of a boolean field that is on unless ``--no-FIELD`` is given."""


def add_fields(
    parser: CommandLineParser, owner: Any, kinds: Mapping[str, Any], names: Collection[str] | None = None
) -> None:
    """An option per field of the dataclass `owner`.

    Args:
        parser: gets the options.
        owner: the class; its ``Attributes:`` section explains each field.
        kinds: types of the options whose field's own type does not do; a tuple lists choices.
        names: of the fields; None is all.
    """
    explained, hints = _explained(owner), get_type_hints(owner)
    for field in _fields(owner, names):
        kind, text = kinds.get(field.name, hints[field.name]), explained.get(field.name, "")
        flag = field.name.replace("_", "-")
        if kind is SWITCH_OFF:
            parser.add_argument(f"--no-{flag}", action="store_true", help=f"do not: {text}")
        elif isinstance(kind, tuple):
            parser.add_argument(f"--{flag}", choices=list(kind), default=field.default, help=text)
        else:
            parser.add_argument(f"--{flag}", type=kind, default=field.default, help=text)


def read_fields(
    options: Any, owner: Any, kinds: Mapping[str, Any], names: Collection[str] | None = None
) -> dict[str, Any]:
    """The values of the options that `add_fields` made, by field."""
    return {
        field.name: not options[f"no_{field.name}"] if kinds.get(field.name) is SWITCH_OFF else options[field.name]
        for field in _fields(owner, names)
    }


def _fields(owner: Any, names: Collection[str] | None) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(owner) if names is None or field.name in names]


def _explained(owner: type) -> dict[str, str]:
    """Texts of the ``Attributes:`` sections of a dataclass and its bases, by field, as help says them."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        section = (base.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^ {8}([\w, ]+): (.+(?:\n {12}.+)*)", section, re.MULTILINE):
            line = re.sub(r"\s+", " ", text).rstrip(".").replace("%", "%%").replace("`", "")
            line = re.sub(r"; None is ([^;.]+)", r" (default: \1)", line)
            for name in names.split(","):
                texts[name.strip()] = line
    return texts
