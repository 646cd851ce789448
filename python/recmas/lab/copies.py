"""General texts for links: lists of words that an agent has just read, so that it knows what it is about to say.

A hidden state is near the embedding of the next token where the model is sure of it. Repeating a list of unrelated
words makes it sure of any word of its vocabulary, which no text of one subject does; and nothing has to be downloaded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from recmas.agents.agent import Agent
from recmas.agents.spelling import spelled

_WORD = re.compile(r" [A-Za-z][a-z]{2,}")


def common_words(agents: Sequence[Agent], without: Collection[str] = ()) -> list[str]:
    """Words that are one token for each of the agents, behind a space, in alphabetical order.

    Args:
        agents: whose vocabularies these are.
        without: words that are left out, whatever their case.
    """
    left_out = {word.lower() for word in without}
    found: set[str] | None = None
    for agent in agents:
        words = {text[1:] for text in spelled(agent) if _WORD.fullmatch(text) and text[1:].lower() not in left_out}
        found = words if found is None else found & words
    return sorted(found or ())


def copies(words: Sequence[str], seed: int, count: int, length: int = 20) -> list[dict[str, object]]:
    """`count` rows of any text for training: a list of random words, and the same list once more.

    A row depends on (words, seed, its number, length) alone.
    """
    rows: list[dict[str, object]] = []
    for number in range(count):
        said = f" {' '.join(random.Random(f'copies/{seed}/{number}').sample(words, length))}"
        rows.append({"prompt": f"List:{said}\nAgain:", "text": said})
    return rows
