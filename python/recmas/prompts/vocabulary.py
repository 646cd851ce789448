"""What a tokenizer makes of texts that nobody vouches for: no special tokens, and none that the model does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_ids(ids: Sequence[int], size: int, tokenizer: Any, name: str) -> None:
    """Raise ValueError, beginning with `name`, if a token id is beyond a model's table of `size` embeddings."""
    if ids and max(ids) >= size:
        token = next(number for number in ids if number >= size)
        text = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(f"{name}: token {token} ({text!r}) of its tokenizer is beyond its model's {size} embeddings")


class Special:
    """Finds texts of which a tokenizer would make a special token, by themselves or with what stands behind them.

    Args:
        tokens: texts of all special tokens.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = frozenset(token for token in tokens if token)
        self._first = frozenset(token[0] for token in self._tokens)
        self._lengths = sorted(set(map(len, self._tokens)))
        self._begun = frozenset(token[:end] for token in self._tokens for end in range(1, len(token)))

    def __call__(self, text: str) -> bool:
        places = (at for at, character in enumerate(text) if character in self._first)
        return any(
            text[at:] in self._begun or any(text[at : at + length] in self._tokens for length in self._lengths)
            for at in places
        )
