"""What links are aligned on: pairs of a frozen agent's hidden state and the token it predicts.

An agent reads a prompt and is forced to say a text. A row with ``targets`` gives its gold messages: the agent's own as
the text, its senders' as text in its prompt. A row with ``text`` gives any text, after its ``prompt`` if it has one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from recmas.agents.agent import Agent
from recmas.agents.targets import end_token, target_tokens
from recmas.config.pattern import Pattern, Visit
from recmas.prompts.rows import Fields, check_fields
from recmas.prompts.targets import check_target, target_text
from recmas.prompts.template import Slot
from recmas.system.prompt_assembly import assemble
from recmas.system.system import System
from recmas.training.data import check_plain, is_plain
from recmas.training.teacher import force


class Utterance(NamedTuple):
    """Token ids that an agent reads, those that it is forced to say after them, and the text that these spell."""

    prompt: array[int]
    said: array[int]
    text: str


class Pairs(NamedTuple):
    """Pairs of several texts, one text after the other.

    ``hidden`` ``[n, d]`` predicts ``ids`` int64 ``[n]``; ``lengths`` are the texts' tokens, n in all.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    lengths: list[int]
    texts: list[str]


def visit_of(pattern: Pattern, role: str, round: int) -> Visit:
    """The visit of ``role`` in the last of ``round`` rounds."""
    for visit in pattern.visits(round):
        if visit.role == role and visit.round == round:
            return visit
    raise ValueError(f"unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")


def check_rows(system: System, role: str, rows: Sequence[Fields], rounds: Sequence[int]) -> None:
    """Raise ValueError, naming row and field, unless every row has what ``role`` reads and says in these rounds."""
    for round in rounds:
        visit = visit_of(system.pattern, role, round)
        readers = dict.fromkeys(system.template(role, round).fields, role)
        for index, row in enumerate(rows):
            if is_plain(row):
                check_plain(row, index)
                continue
            check_fields(row, index, readers)
            check_target(row, index, role, round)
            for sender, at in zip(visit.senders, visit.sender_rounds, strict=True):
                target_text(row, index, sender, at)


def utterances(
    system: System, role: str, rows: Sequence[Fields], round: int, *, max_tokens: int | None = None
) -> list[Utterance]:
    """What ``role`` reads and says of each row in ``round``; ``max_tokens`` keeps the first tokens of what it says.

    A gold message, and a text after a prompt of its own, ends with the end-of-sequence token. A text without a prompt
    stands after the tokenizer's first token (where it has none, after the one that ends texts) and ends as it ends; of
    one that is longer than the model's context, the beginning is taken.
    """
    visit = visit_of(system.pattern, role, round)
    agent = system.agents[role]
    texts = [
        check_plain(row, index) if is_plain(row) else target_text(row, index, role, round)
        for index, row in enumerate(rows)
    ]
    made = []
    for index, (row, text, tokens) in enumerate(zip(rows, texts, target_tokens(agent, texts), strict=True)):
        if not is_plain(row):
            senders = zip(visit.senders, visit.sender_rounds, strict=True)
            said = {sender: target_text(row, index, sender, at) for sender, at in senders}
            prompt = _flat(system.segments(visit, row, said))
        elif "prompt" in row:
            prompt = _flat(system.text_segments(role, str(row["prompt"])))
        else:
            prompt, tokens = [_first_token(agent)], tokens[:-1]
        limit = max_tokens
        if is_plain(row) and agent.context_length is not None:
            room = max(1, agent.context_length + 1 - len(prompt))
            limit = room if limit is None else min(limit, room)
        made.append(Utterance(array("i", prompt), array("i", tokens[:limit]), text))
    return made


def speak(agent: Agent, said: Sequence[Utterance]) -> Pairs:
    """The pairs of these utterances, by one forward; no link takes part, and no gradient is kept."""
    with torch.no_grad():
        segments = [[list(one.prompt)] for one in said]
        prompt = assemble(agent.embed, segments, {}, {}, pad_id=agent.pad_id, device=agent.device)
        speech = force(agent, prompt, [list(one.said) for one in said])
        forced = speech.mask.bool()
        return Pairs(
            speech.hidden[forced], speech.ids[forced], [len(one.said) for one in said], [one.text for one in said]
        )


def _flat(segments: Sequence[list[int] | Slot]) -> list[int]:
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Slot):
            raise AssertionError(f"slot {segment} has no text")
        ids += segment
    return ids


def _first_token(agent: Agent) -> int:
    begin = agent.tokenizer.bos_token_id
    return end_token(agent) if begin is None else int(begin)
