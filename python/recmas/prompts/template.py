"""Templates and slots. No torch here.

A template is parsed once into literals, ``{{field}}`` (from the question's row) and ``{{from:role}}`` (a slot for that
agent's message). Rendering is a single pass: inserted values are never scanned again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recmas.prompts.rows import readable

_FIELD = re.compile(r"[A-Za-z_][\w.-]*")
_FROM = re.compile(r"from:([\w-]+(?:,[\w-]+)*)")


@dataclass(frozen=True)
class Slot:
    """Where a message goes: of one sender, or of several that share one joint slot."""

    senders: tuple[str, ...]

    def __str__(self) -> str:
        return "{{from:" + ",".join(self.senders) + "}}"


@dataclass(frozen=True)
class _Field:
    name: str


class Template:
    """A prompt template; `fields` and `slots` list what it names, in order.

    Raises:
        ValueError: a mark that is neither ``{{field}}`` nor ``{{from:role}}``, one that is never closed, or half of a
            surrogate pair.
    """

    def __init__(self, text: str) -> None:
        self.text = readable(text, f"template {shortened(text)}")
        self._parts: list[str | _Field | Slot] = []
        position = 0
        while (start := text.find("{{", position)) >= 0:
            end = text.find("}}", start + 2)
            if end < 0:
                raise ValueError(f"template {shortened(text)}: '{{{{' is never closed")
            self._literal(text[position:start])
            self._parts.append(self._mark(text[start + 2 : end]))
            position = end + 2
        self._literal(text[position:])
        self.fields = tuple(dict.fromkeys(part.name for part in self._parts if isinstance(part, _Field)))
        self.slots = tuple(part for part in self._parts if isinstance(part, Slot))

    def _literal(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def _mark(self, written: str) -> _Field | Slot:
        inner = written.strip()
        if sent := _FROM.fullmatch(inner):
            return Slot(tuple(sent.group(1).split(",")))
        if _FIELD.fullmatch(inner):
            return _Field(inner)
        mark = shortened(f"{{{{{written}}}}}")
        raise ValueError(f"template {shortened(self.text)}: {mark} is neither a field nor from:role")

    @property
    def senders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(role for slot in self.slots for role in slot.senders))

    def without_slots(self, but: Slot | None = None) -> str:
        """The template's text with every slot left out; `but` stands where the first one was, or at the end."""
        waiting = [] if but is None else [str(but)]
        texts = []
        for part in self._parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, _Field):
                texts.append(f"{{{{{part.name}}}}}")
            elif waiting:
                texts.append(waiting.pop())
        return "".join(texts + waiting)

    def check_senders(self, senders: Sequence[str], joint: bool, where: str) -> None:
        """Every sender must have a slot and every slot its senders; `where` begins the one-line ValueError.

        `joint`: all senders meet in one slot ``{{from:a,b}}``; else each has its own.
        """
        for role in self.senders:
            if role not in senders:
                readable = ", ".join(senders) or "nobody"
                raise ValueError(
                    f"{where}: template {shortened(self.text)} has a slot for {role!r}, but reads from {readable}"
                )
        there = {frozenset(found.senders) for found in self.slots}
        for slot in [Slot(tuple(senders))] if joint and senders else [Slot((role,)) for role in senders]:
            if frozenset(slot.senders) not in there:
                raise ValueError(f"{where}: template {shortened(self.text)} has no slot {slot}")
        for found in self.slots:
            if len(found.senders) > 1 and not joint:
                raise ValueError(f"{where}: joint slot {found} needs combine 'mean' or 'weighted'")

    def render(self, row: Mapping[str, object]) -> list[str | Slot]:
        """Literals and the row's values joined into text between the slots.

        Raises:
            ValueError: a field that the row lacks; names template and field.
        """
        rendered: list[str | Slot] = []
        texts: list[str] = []  # since the last slot
        for part in self._parts:
            if isinstance(part, _Field):
                if part.name not in row:
                    known = ", ".join(sorted(row)) or "nothing"
                    raise ValueError(
                        f"template {shortened(self.text)}: no field {part.name!r} in the row, which has {known}"
                    )
                part = str(row[part.name])
            if isinstance(part, str):
                texts.append(part)
                continue
            rendered += ["".join(texts), part] if texts else [part]
            texts = []
        return [*rendered, "".join(texts)] if texts else rendered


def shortened(text: str) -> str:
    """A text as an error message quotes it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
