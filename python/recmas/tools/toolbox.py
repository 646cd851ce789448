"""Tools by name: finding calls in what a model writes, running them, and keeping results from looking like calls."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_NAME = re.compile(r"[A-Za-z][\w-]*")
_CUT = "\n[cut]"


class Tool(Protocol):
    """Anything with a name and a way from text to text."""

    @property
    def name(self) -> str:
        """The tag that calls it: letters, digits, "_" and "-", a letter first."""

    def run(self, text: str) -> str:
        """The result for the text of one call; the model reads what it raises in one line."""


@dataclass
class ToolCall:
    """One call: what the model wrote between the tags, and what it read then, before any cut to the context.

    In what it read, characters that do not show are escapes, and ``&lt;`` begins what looked like one of our tags.
    """

    name: str
    text: str
    result: str


class Toolbox:
    """Tools, and how far a row may go with them.

    Args:
        tools: with different names.
        max_calls: calls per row; later ones are not run, and the model reads so.
        max_output: most characters of a result.

    Raises:
        ValueError: no list, a tool without a usable name or `run`, two of one name, or a bound below its least value.
    """

    def __init__(self, tools: Sequence[Tool], *, max_calls: int = 5, max_output: int = 6000) -> None:
        if isinstance(tools, str) or not isinstance(tools, Sequence):
            raise ValueError(f"tools: {tools!r}, expected a list of tools")
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            name = getattr(tool, "name", None)
            if not isinstance(name, str) or not _NAME.fullmatch(name) or not callable(getattr(tool, "run", None)):
                raise ValueError(f"tools: {tool!r} is not a tool with a name of letters and a run(text)")
            if name in self.tools:
                raise ValueError(f"tools: two are called {name!r}")
            self.tools[name] = tool
        if max_calls < 0:
            raise ValueError(f"max_calls: {max_calls} is negative")
        if max_output < len(_CUT):
            raise ValueError(f"max_output: {max_output} is less than {len(_CUT)}")
        self.max_calls, self.max_output = max_calls, max_output
        names = "|".join(map(re.escape, self.tools))
        self._tag = re.compile(rf"<(?=/?\s*(?:{'|'.join(['result', *map(re.escape, self.tools)])})\b)", re.IGNORECASE)
        self._call = re.compile(rf"<({names})>((?:(?!<\1>).)*?)</\1>", re.DOTALL)

    def find(self, text: str) -> re.Match[str] | None:
        """The first closed call in `text`: group 1 the tool, group 2 what it is given. The innermost opening counts."""
        return self._call.search(text) if self.tools else None

    def call(self, name: str, text: str, before: int) -> ToolCall:
        """Run one call of a row that made `before` earlier ones."""
        if before >= self.max_calls:
            return ToolCall(name, text, f"error: no more than {self.max_calls} calls")
        try:
            result = self.tools[name].run(text)
        except Exception as error:  # whatever went wrong in a tool is the model's to read
            message = " ".join(str(error).split())
            result = f"error: {type(error).__name__}: {message}"
        if not isinstance(result, str):
            raise TypeError(f"tools: {name!r} returned {type(result).__name__}, expected str")
        result = self._plain(result)
        if len(result) > self.max_output:
            result = result[: self.max_output - len(_CUT)] + _CUT
        return ToolCall(name, text, result)

    def _plain(self, text: str) -> str:
        """`text` in which nothing passes for the end of the result or for a call.

        Also not after a tokenizer's compatibility normalisation, which makes "<" of "＜": a text that holds a tag then
        is normalised here.
        """
        shown = "".join(map(_shown, text.replace("\r\n", "\n")))
        normal = unicodedata.normalize("NFKC", shown)
        return self._tag.sub("&lt;", normal) if self._tag.search(normal) else shown


def _shown(character: str) -> str:
    """A character, or the escape of one that does not show: control, format, surrogate."""
    hidden = character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs")
    return character.encode("unicode_escape").decode() if hidden else character
