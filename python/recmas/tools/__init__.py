"""Tools that the answering agent may call while it writes.

The model writes ``<name> ... </name>``; the text between goes to the tool of that name, and `` <result> ... </result>``
follows in the model's own row. Nothing else changes: the row goes on upon its own cache, and so do its neighbours.
They wait while a tool runs, though, and calls run one at a time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from recmas.agents.detokenizer import Detokenizer
from recmas.tools.python import PythonTool

__all__ = ["SHIPPED", "PythonTool", "Tool", "ToolCall", "Toolbox"]

SHIPPED: dict[str, Callable[[str | None], Tool]] = {"python": lambda sandbox: PythonTool(sandbox=sandbox)}
"""Tools by name, each made with the sandbox of its programs (None: the first that works here)."""
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


class Caller:
    """The reply of one batch's decoding: finds calls in what rows write, runs them, and returns results as tokens.

    Args:
        toolbox: the tools.
        batch: number of rows.
        decode: text of token ids.
        encode: token ids of a text in which nothing is special.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        batch: int,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], list[int]],
    ) -> None:
        self._toolbox, self._decode, self._encode = toolbox, decode, encode
        self._texts = [""] * batch  # of each row since its last call
        self._pieces = [Detokenizer(decode) for _ in range(batch)]
        self.calls: list[list[ToolCall]] = [[] for _ in range(batch)]

    def __call__(self, row: int, token: int, room: int) -> list[int]:
        self._texts[row] += (piece := self._pieces[row].add([token]))
        if room == 0 or ">" not in piece:
            return []
        found = self._toolbox.find(self._texts[row])
        if found is None:
            return []
        calls = self.calls[row]
        calls.append(self._toolbox.call(found[1], found[2], len(calls)))
        self._texts[row], self._pieces[row] = "", Detokenizer(self._decode)
        return self._encode(f" <result> {calls[-1].result.strip()} </result>")[:room]
