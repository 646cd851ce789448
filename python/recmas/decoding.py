"""The one decoding loop: each row is written by itself, on the same cache as the rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from recmas.cache import Reader, read
from recmas.sampling import Sampler

if TYPE_CHECKING:
    from recmas.agent import Agent
    from recmas.splice import Prompt

_UNBOUNDED = 1 << 62
Reply = Callable[[int, int, int], Sequence[int]]
"""``reply(row, token, room)``: what the row reads after the token it just wrote; at most `room` ids.

Called for every token of every row of the batch; `room` is 0 after a row's last one."""


@torch.no_grad()
def write(
    agent: Agent,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: Sequence[int],
    rows: Sequence[int],
    reply: Reply | None = None,
    reader: Reader = read,
) -> Iterator[dict[int, list[int]]]:
    """Write text; after every step, the token ids by which rows of the batch grew.

    What a reply adds to a row is fed to that row alone, one token a step beside the other rows' own, or several at once
    where every row has some: its cache goes on, nothing is read twice, and no other row is held up or changed by it.

    Args:
        agent: writes.
        prompt: the batch of prompts.
        max_new_tokens: most tokens that a row writes; those of replies do not count. They do count against the context.
        temperature: 0 is greedy.
        top_p: nucleus, in (0, 1].
        seed: integers that name the run.
        rows: number of each row in the run, for its random stream.
        reply: see `Reply`.
        reader: reads the prompt.
    """
    batch, context = prompt.embeds.shape[0], agent.context_length
    used = prompt.mask.sum(dim=1).tolist()
    space = [_UNBOUNDED if context is None else context - positions + 1 for positions in used]  # left in the context
    left = [min(max_new_tokens, positions) for positions in space]  # tokens that each row may still write
    sampler = Sampler(temperature, top_p, seed, rows)
    going = {row for row in range(batch) if left[row] > 0}
    if not going:
        return
    unread: list[list[int]] = [[] for _ in range(batch)]
    ends = agent.eos_ids
    past, hidden = reader(agent.decoder, prompt, max(left) - 1, context)
    while True:
        choosing = {row for row in going if not unread[row]}
        tokens = sampler.choose(agent.logits(hidden), choosing).tolist() if choosing else []
        grown = {}
        for row in sorted(choosing):
            token = tokens[row]
            left[row] -= 1
            space[row] -= 1
            last = token in ends or left[row] == 0 or space[row] == 0
            answer = [] if reply is None else list(reply(row, token, 0 if last else space[row]))
            space[row] -= len(answer)
            if last or space[row] == 0:
                going.discard(row)
            grown[row] = unread[row] = [token, *answer]
        yield grown
        if not going:
            return
        width = min(len(unread[row]) for row in going)
        fed = [unread[row][:width] if row in going else [agent.pad_id] * width for row in range(batch)]
        unread = [ids[width:] for ids in unread]
        hidden = past.feed(agent.embed(torch.tensor(fed, device=agent.device)))


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
