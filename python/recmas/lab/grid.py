"""What a relay system can do: accuracy for hops x rounds, in latents and in text, and the controls that must fail."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from recmas import RecursiveMAS
from recmas.evaluation import METRICS
from recmas.lab.agents import relay_system
from recmas.lab.world import chance, questions
from recmas.pattern import Visit
from recmas.splice import Latents

MODES = ("latent", "text")
CONTROLS = ("solver alone", "untrained links", "shuffled latents")
BATCH = 256
Row = dict[str, object]


@dataclass(frozen=True)
class Cell:
    """One way of answering questions of ``hops`` hops in ``rounds`` rounds.

    ``accuracy`` and ``chance`` are shares; ``text_tokens`` (decoded by all agents), ``latent_steps`` and ``seconds``
    are per question. The solver alone is measured once per number of hops, as zero rounds: it hears nobody.
    """

    method: str
    hops: int
    rounds: int
    questions: int
    accuracy: float
    chance: float
    text_tokens: float
    latent_steps: float
    seconds: float


def grid(
    system: RecursiveMAS,
    seed: int,
    count: int,
    *,
    hops: Sequence[int] = (1, 2, 3),
    rounds: Sequence[int] = (1, 2, 3),
    methods: Sequence[str] = (*MODES, *CONTROLS),
    split: str = "test",
    on_cell: Callable[[Cell], object] | None = None,
) -> list[Cell]:
    """Measure every method on every cell, on ``count`` fresh questions per number of hops.

    Args:
        system: a relay system.
        seed: of the questions' worlds.
        count: questions per number of hops; all rounds and methods answer the same ones.
        hops, rounds: the grid's sides.
        methods: of ``MODES`` and ``CONTROLS``.
        split: "test", or "validation" for choosing between systems.
        on_cell: called with each finished cell.
    """
    if unknown := [method for method in methods if method not in (*MODES, *CONTROLS)]:
        raise ValueError(f"methods: {unknown[0]!r} is not one of {', '.join((*MODES, *CONTROLS))}")
    if count < 2:
        raise ValueError(f"count: {count} is too few; latents are shuffled among 2 questions or more")
    untrained = relay_system(system.agents, seed) if "untrained links" in methods else system
    cells = []
    for hop_count in hops:
        rows = questions(split, seed, [hop_count], count)
        for method, round_count in runs(methods, rounds):
            cell = _cell(system, untrained, method, rows, hop_count, round_count)
            cells.append(cell)
            if on_cell is not None:
                on_cell(cell)
    return cells


def runs(methods: Sequence[str], rounds: Sequence[int]) -> list[tuple[str, int]]:
    """Every (method, rounds) that is measured for one number of hops; the solver alone goes no rounds."""
    return [
        (method, count)
        for method, count in itertools.product(methods, rounds)
        if method != "solver alone" or count == rounds[0]
    ]


def _cell(
    system: RecursiveMAS, untrained: RecursiveMAS, method: str, rows: Sequence[Row], hops: int, rounds: int
) -> Cell:
    started = time.perf_counter()
    if method == "solver alone":
        rounds = 0
        texts, text_tokens, latent_steps = _solver_alone(system, rows)
    else:
        answers = (untrained if method == "untrained links" else system).answer(
            rows,
            mode="text" if method == "text" else "latent",
            rounds=rounds,
            batch_size=BATCH,
            on_message=_shuffled if method == "shuffled latents" else None,
        )
        texts = [answer.text for answer in answers]
        text_tokens = sum(sum(answer.text_tokens.values()) for answer in answers)
        latent_steps = sum(sum(answer.latent_steps.values()) for answer in answers)
    seconds = time.perf_counter() - started
    right = sum(METRICS["last_word"](text, str(row["answer"])) for text, row in zip(texts, rows, strict=True))
    count = len(rows)
    costs = (text_tokens / count, latent_steps / count, seconds / count)
    return Cell(method, hops, rounds, count, right / count, chance(hops, rounds), *costs)


def _solver_alone(system: RecursiveMAS, rows: Sequence[Row]) -> tuple[list[str], int, int]:
    """The solver with its own sheet, and the question where the critic's message belongs."""
    role = system.pattern.last
    visit = next(visit for visit in system.pattern.visits(1) if visit.role == role)
    agent, limit = system.agents[role], system.settings[role].decoding.max_new_tokens
    texts, tokens = [], 0
    for batch in _batches(rows):
        heard = {sender: [str(row["question"]) for row in batch] for sender in visit.senders}
        for written in agent.decode(system.prompt(visit, batch, heard), limit):
            texts.append(agent.text(written))
            tokens += len(written)
    return texts, tokens, 0


def _shuffled(visit: Visit, message: Latents | list[str]) -> Latents | list[str]:
    """Every question gets the latents of another one of its batch."""
    if isinstance(message, list):
        return message[1:] + message[:1]
    return Latents(torch.roll(message.states, 1, dims=0), message.lengths)


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for first in range(0, len(rows), BATCH):
        yield rows[first : first + BATCH]


def summary(cells: Sequence[Cell]) -> str:
    """Accuracy alone: a line per number of hops, a column per method and rounds."""
    columns = list(dict.fromkeys((cell.method, cell.rounds) for cell in cells))
    reached = {((cell.method, cell.rounds), cell.hops): cell.accuracy for cell in cells}
    titles = [f"{method} r={rounds}" if rounds else method for method, rounds in columns]
    lines = ["accuracy  " + "  ".join(titles)]
    for hops in dict.fromkeys(cell.hops for cell in cells):
        shares = (f"{reached[column, hops]:>{len(title)}.3f}" for column, title in zip(columns, titles, strict=True))
        lines.append(f"{hops} hop{'s' if hops > 1 else ' '}    " + "  ".join(shares))
    return "\n".join(lines)


def heading() -> str:
    """Names of the columns of `line`."""
    names = ("hops", "rounds", "method", "accuracy", "chance", "text tokens", "latent steps", "ms/question")
    return "{:>4} {:>6}  {:<16} {:>8} {:>6} {:>11} {:>12} {:>11}".format(*names)


def line(cell: Cell) -> str:
    """A cell as a line of text."""
    return (
        f"{cell.hops:>4} {cell.rounds or '-':>6}  {cell.method:<16} {cell.accuracy:>8.3f} {cell.chance:>6.3f} "
        f"{cell.text_tokens:>11.1f} {cell.latent_steps:>12.1f} {cell.seconds * 1e3:>11.2f}"
    )
