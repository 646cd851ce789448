"""Token ids of a growing row to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Detokenizer:
    """The text of a growing row, piece by piece; the pieces join to `text_of` the row.

    A character whose bytes are spread over several tokens appears when its last byte does.

    Args:
        decode: text of token ids, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # the tokens of the last piece, which the next ones need for their spaces
        self._shown = 0
        self._known = ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` make certain; may be empty."""
        piece = ""
        for token in tokens:
            self._window.append(token)
            text = self._decode(self._window)
            if not text.endswith("\ufffd"):
                piece += self._take(text)
        return piece

    def finish(self) -> str:
        """What was held back: the replacement character of a row that ends within a character."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        piece = text[len(self._known) :]
        if piece:
            self._window = self._window[self._shown :]
            self._known, self._shown = self._decode(self._window), len(self._window)
        return piece


def text_of(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """The text of a row, as the pieces of a `Detokenizer` join to it.

    Decoding everything at once gives the same but for bytes that are no character: some tokenizers then take back
    characters before them too.
    """
    text = decode(tokens)
    if "\ufffd" not in text:
        return text
    pieces = Detokenizer(decode)
    return pieces.add(tokens) + pieces.finish()
