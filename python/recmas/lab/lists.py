"""Lists: long messages, of which the sender does not know what will be needed.

The worlds are the relay's. The question gives the planner ten words as a numbered list, "bako 1 miko 2 ... gelu 10". It
replies with their colours, "red 1 blue 2 ... gold 10", the critic with the colours' animals, and the solver, which
alone is asked for one number of the list, with the one word that its sheet has for that animal. So all that a sender
can do is to say everything: twenty tokens. Numbers stand behind what they count, so that an agent knows what belongs to
a number where it reads the number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from recmas.lab.world import ROLES, SPLITS, Turn, World, draw_world

LENGTH = 10
"""Items of a list."""
NUMBERS = tuple(str(number) for number in range(1, LENGTH + 1))


def numbered(values: Sequence[str]) -> str:
    """The list as text."""
    return " ".join(f"{value} {number}" for value, number in zip(values, NUMBERS, strict=True))


def row(rng: random.Random) -> dict[str, object]:
    """One question, as a row of a data file.

    ``question`` is the planner's list, ``number`` the item that the solver is asked for, the three ``*_sheet`` fields
    are private to one template each, ``answer`` is a word, ``targets`` maps each role to its text.
    """
    world = draw_world(rng)
    values = rng.choices(list(world.colour_of), k=LENGTH)
    number = rng.choice(NUMBERS)
    fields: dict[str, object] = {"question": numbered(values), "number": number}
    fields.update({f"{role}_sheet": world.sheet(role, rng) for role in ROLES})
    targets: dict[str, str] = {}
    for role in ROLES:
        values = [world.facts(role)[value] for value in values]
        targets[role] = numbered(values)
    answer = targets["solver"] = values[NUMBERS.index(number)]
    return {**fields, "answer": answer, "hops": 1, "targets": targets}


def questions(split: str, seed: int, hops: Sequence[int], count: int, *, first: int = 0) -> list[dict[str, object]]:
    """Rows ``first`` ... ``first + count - 1`` of an endless stream.

    A row depends on (split, seed, its number) alone. The split is part of every row's seed, so worlds of different
    splits never share a generator. Every question is of one hop.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if wrong := [count for count in hops if count != 1]:
        raise ValueError(f"hops must be 1 in questions of lists, got {wrong[0]}")
    return [row(random.Random(f"list/{split}/{seed}/{number}")) for number in range(first, first + count)]


def turns(role: str, world: World, rng: random.Random) -> Iterator[Turn]:
    """Exchanges for lessons of one role, without end: list after list, or the solver's questions on one list."""
    facts: Mapping[str, str] = world.facts(role)
    while True:
        values = rng.choices(list(facts), k=LENGTH)
        found = [facts[value] for value in values]
        looked_up = [word for value in found for word in (value, value)]
        if role != "solver":
            yield Turn(numbered(values), looked_up, numbered(found))
            continue
        while True:
            number = rng.choice(NUMBERS)
            yield Turn(numbered(values), looked_up, found[NUMBERS.index(number)], {"number": number})
