"""Rows as `RecursiveMAS.answer` takes them: a question, a mapping of fields, or a chat. No torch here.

The last message of a chat is its question: it fills ``{{question}}`` in every template. The messages before it stand
before the prompt in the chat template of every agent, as they were said; a system message among them follows the
agent's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

Fields = Mapping[str, object]
Messages = tuple[dict[str, str], ...]


class ChatRow(dict[str, object]):
    """The fields of a row whose question ends a conversation; `earlier` holds what was said before it."""

    def __init__(self, fields: Fields, earlier: Messages) -> None:
        super().__init__(fields)
        self.earlier = earlier


def earlier(row: Fields) -> Messages:
    """The messages before a row's question."""
    return row.earlier if isinstance(row, ChatRow) else ()


def read_row(row: object, index: int) -> Fields:
    """The fields of one row.

    Args:
        row: a question; a list of messages ``{"role": ..., "content": ...}``; or a mapping of fields, in which
            ``messages`` without ``question`` is such a list.
        index: begins error messages.

    Raises:
        ValueError: anything else, or a chat that is not (system,) user, assistant, ..., user.
    """
    if isinstance(row, str):
        return {"question": row}
    if isinstance(row, Mapping):
        if "messages" not in row or "question" in row:
            return row
        return _chat(row["messages"], {name: value for name, value in row.items() if name != "messages"}, index)
    if isinstance(row, Sequence) and not isinstance(row, bytes | bytearray):
        return _chat(row, {}, index)
    raise ValueError(f"row {index}: {type(row).__name__}, expected a string, a list of messages or a mapping of fields")


def check_fields(row: Fields, index: int, readers: Mapping[str, str]) -> None:
    """Raise ValueError, naming row and field, unless the row has every field with something that a prompt can hold.

    Args:
        row: of the run.
        index: its number.
        readers: by field, an agent that reads it.
    """
    for field, role in readers.items():
        if field not in row:
            raise ValueError(
                f"row {index}: no field {field!r}, which agent {role!r} reads; it has {', '.join(sorted(row))}"
            )
        text_of(row[field], f"row {index}: field {field!r}")


def text_of(value: object, what: str) -> str:
    """A row's value as a prompt holds it: a text as it is, a number as Python writes it.

    Raises:
        ValueError: null, a truth value, a number that is not finite (as tables have it where nothing stands), a list,
            an object, or half of a surrogate pair; begins with `what`.
    """
    if value is None:
        raise ValueError(f"{what} is null; write the text that stands there, or an empty one")
    number = isinstance(value, Real | Decimal) and not isinstance(value, bool) and _is_finite(value)
    if not (isinstance(value, str) or number):
        raise ValueError(f"{what} is {_short(value)}, expected a text or a number")
    return readable(str(value), what)


def _is_finite(number: Real | Decimal) -> bool:
    """Of any size: `math.isfinite` makes a float of it."""
    return number == number and abs(number) != math.inf


def readable(text: str, what: str) -> str:
    """The text itself, which a tokenizer can read; ValueError, beginning with `what`, for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{what} holds {half}, half of a surrogate pair, which is no character") from None
    return text


def length(row: Fields) -> int:
    """Characters of a row, to put rows of similar length into one batch."""
    said = sum(len(message["content"]) for message in earlier(row))
    return said + sum(len(str(value)) for value in row.values())


def _chat(messages: Any, fields: Fields, index: int) -> ChatRow:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"row {index}: messages: expected a list of at least one message, got {_short(messages)}")
    read: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        where = f"row {index}, message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"{where}: {_short(message)} is not an object with role and content")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(f"{where}: content: {type(content).__name__}, expected a string")
        readable(content, f"{where}: content")
        before = read[-1]["role"] if read else None
        expected = ("system", "user") if before is None else ("assistant",) if before == "user" else ("user",)
        if role not in expected:
            raise ValueError(f"{where}: role {role!r}, expected {' or '.join(expected)}")
        read.append({"role": role, "content": content})
    if read[-1]["role"] != "user":
        raise ValueError(f"row {index}: the last message is of role {read[-1]['role']!r}, expected user: the question")
    return ChatRow({**fields, "question": read.pop()["content"]}, tuple(read))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
