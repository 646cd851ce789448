"""`Caller`: the calls of one batch's decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recmas.agents.detokenizer import Detokenizer
from recmas.tools.toolbox import Toolbox, ToolCall


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
