"""The notes task: a reader with private notes, a solver with a question, and natural language between them.

The reader's notes say where a few people live, what they do, keep, drink and play. The solver is asked for one of these
(one hop), or for something that its own notes say of the city (two hops), and hears of the reader's notes by message
alone. The message ends a sentence whose beginning both know, "Anna works as a": first with what was asked for, then
with the rest of what is known of that person, some thirty tokens in all.

Names and values come in two halves. Training texts hold the known half alone; a question of the unknown half has names
and values that no link has ever met.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from recmas.agents.agent import Agent
from recmas.config.pattern import Pattern
from recmas.config.system_json import Decoding, PromptSpec
from recmas.prompts.targets import target_text
from recmas.recursive_mas import RecursiveMAS

HALVES = ("known", "unknown")
PEOPLE = 3
"""In the reader's notes."""
ROLES = ("reader", "solver")
PATTERN = Pattern((("reader",), ("solver",)))
MESSAGE_TOKENS, ANSWER_TOKENS = 32, 6

# Even places are the known half, odd ones the unknown half.
NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo"),
    *("Maria", "Nina", "Oscar", "Paul", "Rita", "Simon", "Tina", "Victor", "Alice", "Boris", "Clara", "Daniel"),
    *("Eva", "Felix", "Hugo", "Ivan", "Julia", "Kevin", "Laura", "Max", "Nora", "Peter", "Rosa", "Sam"),
)
VALUES = {
    "city": (
        *("Oslo", "Paris", "Rome", "Cairo", "Lima", "Tokyo", "Berlin", "Madrid", "Dublin", "Vienna"),
        *("Prague", "Boston", "Denver", "Sydney", "Athens", "Moscow", "London", "Milan", "Delhi", "Seoul"),
    ),
    "job": (
        *("baker", "lawyer", "nurse", "pilot", "farmer", "teacher", "doctor", "painter", "singer", "writer"),
        *("driver", "chef", "judge", "sailor", "actor", "barber", "banker", "soldier", "tailor", "miner"),
    ),
    "animal": (
        *("cat", "dog", "parrot", "rabbit", "horse", "turtle", "hamster", "goat", "lizard", "snake"),
        *("duck", "pig", "fox", "mouse", "frog", "sheep", "donkey", "camel", "pigeon", "cow"),
    ),
    "drink": (
        *("tea", "coffee", "milk", "water", "juice", "wine", "beer", "cocoa", "cider", "soda"),
        *("whiskey", "rum", "brandy", "lemonade", "gin", "vodka", "champagne", "punch", "sherry", "espresso"),
    ),
    "instrument": (
        *("piano", "violin", "guitar", "flute", "drums", "harp", "trumpet", "cello", "organ", "banjo"),
        *("clarinet", "saxophone", "trombone", "ukulele", "accordion", "bass", "horn", "fiddle", "oboe", "harmonica"),
    ),
    "language": (
        *("French", "German", "Greek", "Polish", "Arabic", "Korean", "Turkish", "Spanish", "Dutch", "Hindi"),
        *("Hebrew", "Swedish", "Russian", "Italian", "Persian", "Finnish", "Thai", "Czech", "Chinese", "Welsh"),
    ),
    "month": ("January", "March", "April", "February", "August", "September", "October", "November"),
}
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange")
SAYING = {
    "city": "lives in {}",
    "job": "works as a {}",
    "animal": "keeps a {}",
    "drink": "likes {}",
    "instrument": "plays the {}",
    "language": "speaks {}",
    "month": "was born in {}",
}
ASKING = {
    "city": "Where does {} live?",
    "job": "What is the job of {}?",
    "animal": "Which animal does {} keep?",
    "drink": "Which drink does {} like?",
    "instrument": "Which instrument does {} play?",
    "language": "Which language does {} speak?",
    "month": "When was {} born?",
}
TWO_HOPS, FLAG = "Which colour has the flag of the city where {} lives?", "The flag of {} is {}."
_SHOWN = (
    "Geneva clerk crab port lute Danish May",
    "Kyoto spy eel mead gong Latin June",
    "Malta monk owl sake lyre Urdu July",
)
_EXAMPLES = (("Zed", "job", 1), ("Yan", "drink", 1), ("Wim", "city", 2))
"""Of the prompts: name, what is asked of whom, and in how many hops."""


def sentence(values: Mapping[str, str], first: str) -> tuple[str, str]:
    """What is known of a person, beginning with the value asked for: the words before that value, and the rest."""
    lead = SAYING[first].removesuffix("{}")
    told = [SAYING[kind].format(values[kind]) for kind in SAYING if kind != first]
    return lead.rstrip(), f" {', '.join([values[first], *told[:-1]])} and {told[-1]}."


def _prompts() -> dict[str, PromptSpec]:
    """Plain completions after three examples, which any model reads, base models, too."""
    reader, solver = "", ""
    for (name, kind, hops), words in zip(_EXAMPLES, _SHOWN, strict=True):
        values = dict(zip(SAYING, words.split(), strict=True))
        told = name + " {}{}".format(*sentence(values, kind))
        notes = name + " {}{}".format(*sentence(values, "city"))
        asked = ASKING[kind].format(name) if hops == 1 else TWO_HOPS.format(name)
        known = "" if hops == 1 else f"Notes: {FLAG.format('Samoa', 'beige')} {FLAG.format(values['city'], 'cyan')}\n"
        reader += f"Notes: {notes}\nQuestion: {asked}\nMessage: {told}\n\n"
        solver += f"{known}Message: {told}\nQuestion: {asked}\nAnswer: {values[kind] if hops == 1 else 'cyan'}\n\n"
    reader += "Notes: {{reader_notes}}\nQuestion: {{question}}\nMessage: {{lead}}"
    solver += "{{solver_notes}}Message: {{lead}}{{from:reader}}\nQuestion: {{question}}\nAnswer:"
    return {"reader": PromptSpec(reader), "solver": PromptSpec(solver)}


PROMPTS = _prompts()
DECODING = {"reader": Decoding(max_new_tokens=MESSAGE_TOKENS), "solver": Decoding(max_new_tokens=ANSWER_TOKENS)}


def half(words: Sequence[str], which: str) -> list[str]:
    """One half of a list of names or values."""
    return list(words[HALVES.index(which) :: 2])


def row(rng: random.Random, which: str, hops: int = 1) -> dict[str, object]:
    """One question with its notes, as a row of a data file.

    Args:
        rng: draws the people, their values and the question.
        which: half of the names and values.
        hops: 1, or 2.
    """
    if which not in HALVES:
        raise ValueError(f"half must be one of {', '.join(HALVES)}, got {which!r}")
    if hops not in (1, 2):
        raise ValueError(f"hops must be 1 or 2, got {hops}")
    names = rng.sample(half(NAMES, which), PEOPLE)
    drawn = {kind: rng.sample(half(words, which), PEOPLE) for kind, words in VALUES.items()}
    people = {name: {kind: values[place] for kind, values in drawn.items()} for place, name in enumerate(names)}
    subject = rng.choice(names)
    if hops == 1:
        kind = rng.choice(list(VALUES))
        question, answer, solver_notes = ASKING[kind].format(subject), people[subject][kind], ""
    else:
        kind = "city"
        colours = dict(zip(drawn["city"], rng.sample(half(COLOURS, which), PEOPLE), strict=True))
        told = [FLAG.format(*flag) for flag in colours.items()]
        rng.shuffle(told)
        question, solver_notes = TWO_HOPS.format(subject), f"Notes: {' '.join(told)}\n"
        answer = colours[people[subject]["city"]]
    lead, message = sentence(people[subject], kind)
    return {
        "question": question,
        "lead": f"{subject} {lead}",
        "reader_notes": " ".join(name + " {}{}".format(*sentence(values, "city")) for name, values in people.items()),
        "solver_notes": solver_notes,
        "answer": answer,
        "hops": hops,
        "half": which,
        "targets": {"reader": message, "solver": f" {answer}"},
    }


def questions(
    split: str, seed: int, count: int, halves: Sequence[str] = HALVES, hops: int = 1
) -> list[dict[str, object]]:
    """`count` rows, of the halves in turn; a row depends on (split, seed, its number, its half, hops) alone."""
    drawn = []
    for number in range(count):
        which = halves[number % len(halves)]
        drawn.append(row(random.Random(f"notes/{split}/{seed}/{number}/{hops}"), which, hops))
    return drawn


def texts(seed: int, count: int, which: str = "known") -> list[dict[str, object]]:
    """`count` messages of one half as rows of any text for training: each follows itself, so that it is expected."""
    rows: list[dict[str, object]] = []
    for one in questions("train", seed, count, [which]):
        message = target_text(one, len(rows), "reader", 1)
        rows.append({"prompt": f"Notes: {one['lead']}{message}\nMessage: {one['lead']}", "text": message})
    return rows


def notes_system(
    agents: Mapping[str, Agent], seed: int = 0, latent_steps: int = 8, prompts: Mapping[str, PromptSpec] | None = None
) -> RecursiveMAS:
    """A reader and a solver with fresh links drawn from `seed`, and the prompts of the task unless others are given."""
    prompts = prompts or PROMPTS
    system = RecursiveMAS.create(agents, PATTERN, prompts=prompts, rounds=1, latent_steps=latent_steps, seed=seed)
    for role, setting in system.settings.items():
        setting.chat, setting.decoding = False, replace(DECODING[role])
    return RecursiveMAS(  # a system renders prompts by the settings that it was made with
        system.agents,
        system.inner_links,
        system.outer_links,
        PATTERN,
        settings=system.settings,
        defaults=system.defaults,
    )


def held_back() -> list[str]:
    """Names and values of the unknown half."""
    return [word for words in (NAMES, *VALUES.values(), COLOURS) for word in half(words, "unknown")]
