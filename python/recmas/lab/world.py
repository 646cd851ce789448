"""The lab's worlds, and the relay's questions: no agent can answer alone, with facts drawn anew for every question.

A world has three random bijections: word -> colour (the planner's sheet), colour -> animal (the critic's) and
animal -> word (the solver's). One hop follows all three once. A message is ``"<hops left> <value>"``; the planner takes
one hop off the counter, and a word that arrives with no hops left is passed on untouched by everybody. So a question of
k hops needs k rounds, and a system that gets fewer can only guess.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ROLES = ("planner", "critic", "solver")
SPLITS = ("train", "validation", "test")
FACTS = 8
"""Words, colours and animals drawn for one question."""
MAX_HOPS = 4
"""The largest counter of a question."""
PASSED_ON = 0.25
"""Share of the critic's and the solver's lessons in which a finished word passes through."""

# The solver spells names in two pieces; every first piece occurs in one name only.
WORDS = (
    *("bako", "cevi", "dima", "fuso", "gelu", "hina", "jovi", "keso", "luma", "miko", "neva", "piso"),
    *("quna", "roko", "salu", "tevi", "vama", "woso", "xeko", "yulu", "zina", "foma", "gavi", "huko"),
)
COLOURS = (
    *("red", "blue", "green", "gold", "pink", "grey", "black", "white"),
    *("brown", "orange", "purple", "teal", "navy", "lime", "olive", "silver"),
)
ANIMALS = (
    *("tiger", "zebra", "panda", "otter", "raven", "lemur", "hippo", "beaver"),
    *("walrus", "donkey", "monkey", "rabbit", "spider", "turtle", "falcon", "badger"),
)


@dataclass(frozen=True)
class World:
    """Three bijections over ``FACTS`` words, colours and animals."""

    colour_of: Mapping[str, str]
    animal_of: Mapping[str, str]
    word_of: Mapping[str, str]

    def hop(self, word: str) -> str:
        """The word that one round of all three agents leads to."""
        return self.word_of[self.animal_of[self.colour_of[word]]]

    def relay(self, role: str, message: str) -> str:
        """What a perfect agent of this role replies to ``message``, as text."""
        hops, value = message.split()
        if value not in self.facts(role):
            return message
        if role == "planner":
            return message if hops == "0" else f"{int(hops) - 1} {self.colour_of[value]}"
        return f"{hops} {self.facts(role)[value]}"

    def sheet(self, role: str, rng: random.Random) -> str:
        """The private facts of one role, in random order, such as ``"bako:red miko:gold ..."``."""
        facts = [f"{key}:{value}" for key, value in self.facts(role).items()]
        rng.shuffle(facts)
        return " ".join(facts)

    def facts(self, role: str) -> Mapping[str, str]:
        """What one role knows."""
        return {"planner": self.colour_of, "critic": self.animal_of, "solver": self.word_of}[role]


def draw_world(rng: random.Random) -> World:
    """A random world: 8 words, 8 colours, 8 animals and the three bijections between them."""
    words, colours, animals = (rng.sample(names, FACTS) for names in (WORDS, COLOURS, ANIMALS))
    return World(
        dict(zip(words, colours, strict=True)),
        dict(zip(rng.sample(colours, FACTS), animals, strict=True)),
        dict(zip(rng.sample(animals, FACTS), rng.sample(words, FACTS), strict=True)),
    )


class Turn(NamedTuple):
    """One exchange of a lesson.

    Attributes:
        message: what stands in the agent's slot.
        found: for each word of it, what the sheet has for it; None for words that are not looked up.
        reply: what a perfect agent says.
        fields: of its template, besides the sheet.
    """

    message: str
    found: Sequence[str | None]
    reply: str
    fields: Mapping[str, str] = {}


def turns(role: str, world: World, rng: random.Random) -> Iterator[Turn]:
    """Exchanges of the relay for lessons of one role, without end."""
    while True:
        if role == "planner":
            message = f"{rng.randint(0, MAX_HOPS)} {rng.choice(list(world.colour_of))}"
        elif rng.random() < PASSED_ON:
            message = f"0 {rng.choice(list(world.colour_of))}"
        else:
            message = f"{rng.randint(0, MAX_HOPS - 1)} {rng.choice(list(world.facts(role)))}"
        reply = world.relay(role, message)
        yield Turn(message, (None, reply.split()[1]), reply)


def row(rng: random.Random, hops: int, rounds: int = MAX_HOPS) -> dict[str, object]:
    """One question of ``hops`` hops, as a row of a data file.

    ``question`` is the planner's first message, the three ``*_sheet`` fields are private to one template each,
    ``answer`` is the word after all hops, ``targets`` maps each role to its texts in round 1, 2, ... ``rounds``.
    """
    if not 0 <= hops <= MAX_HOPS:
        raise ValueError(f"hops must be between 0 and {MAX_HOPS}, got {hops}")
    world = draw_world(rng)
    start = rng.choice(list(world.colour_of))
    answer = start
    for _ in range(hops):
        answer = world.hop(answer)
    message = f"{hops} {start}"
    fields: dict[str, object] = {"question": message}
    fields.update({f"{role}_sheet": world.sheet(role, rng) for role in ROLES})
    targets: dict[str, list[str]] = {role: [] for role in ROLES}
    for _, role in itertools.product(range(rounds), ROLES):
        message = world.relay(role, message)
        targets[role].append(message)
    return {**fields, "answer": answer, "hops": hops, "targets": targets}


def questions(
    split: str, seed: int, hops: Sequence[int], count: int, *, first: int = 0, rounds: int = MAX_HOPS
) -> list[dict[str, object]]:
    """Rows ``first`` ... ``first + count - 1`` of an endless stream.

    Hop counts are drawn from ``hops``, repeats give weight. A row depends on (split, seed, its number, hops, rounds)
    alone. The split is part of every row's seed, so worlds of different splits never share a generator.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rows = []
    for number in range(first, first + count):
        rng = random.Random(f"relay/{split}/{seed}/{number}")
        rows.append(row(rng, rng.choice(hops), rounds))
    return rows


def chance(hops: int, rounds: int) -> float:
    """Best accuracy without what the missing messages would have said.

    With as many rounds as hops and a message lost, nothing but a guess among the 8 words is left: 1/8. A perfect system
    that is m = hops - rounds rounds short knows the word it has reached; answering that word is right when m more hops
    lead back to it, which a random permutation of 8 does with probability (divisors of m up to 8) / 8.
    """
    missing = max(hops - rounds, 1)
    return sum(missing % cycle == 0 for cycle in range(1, FACTS + 1)) / FACTS
