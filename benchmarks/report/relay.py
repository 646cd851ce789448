"""What the records of `benchmarks.relay` say of the paper's claims: the shipped lab, three agents of half a million."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.harness.link_seeds import Seeds, change, crossed, interval
from benchmarks.harness.timing import Ratio
from benchmarks.relay.ablations import KINDS
from benchmarks.report.claims import FAILS, HOLDS, UNTOLD, Finding, verdict_of
from benchmarks.report.tables import duration, number
from recmas.answering.options import SETTLED
from recmas.evaluation.paired import Difference

STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""By degrees of freedom, what a mean of so many values and one more reaches within in 95 % of all cases."""
Cells = list[dict[str, Any]]
"""One for each link seed."""


def _by(record: dict[str, Any], *names: str) -> dict[tuple[Any, ...], Cells]:
    found: dict[tuple[Any, ...], Cells] = {}
    for cell in sorted(record["cells"], key=lambda cell: cell["link_seed"]):
        found.setdefault(tuple(cell[name] for name in names), []).append(cell)
    return found


def _right(cells: Cells) -> list[list[float]]:
    return [[float(one) for one in cell["correct"]] for cell in cells]


def _mean(cells: Cells, name: str) -> float:
    return statistics.fmean(cell[name] for cell in cells)


def _seconds(cells: Cells) -> list[float]:
    """Of every turn of every seed."""
    return [one for cell in cells for one in cell["seconds"]]


def _share(cells: Cells) -> str:
    """Accuracy with its 95 % interval."""
    value, low, high = interval(_right(cells))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _of_seeds(record: dict[str, Any]) -> str:
    seeds = {cell["link_seed"] for cell in record["cells"]}
    return f"{len(seeds)} link seed{'s' * (len(seeds) > 1)}, {record['questions']['count']} questions: "


def _difference(one: Difference) -> str:
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def grows_with_rounds(record: dict[str, Any]) -> Finding:
    """Whether a round more answers more questions, in each mode."""
    cells, words, hold = _by(record, "mode", "rounds"), [], []
    for mode in ("latent", "text"):
        members = [cells[mode, rounds] for rounds in (1, 2, 3)]
        words.append(f"{mode}: {', '.join(map(_share, members))} at r = 1, 2, 3")
        for before, after in itertools.pairwise(members):
            gain = change(_right(before), _right(after))
            hold.append(gain.shown and gain.value > 0)
    return Finding(_of_seeds(record) + "; ".join(words), verdict_of(hold))


def more_accurate(record: dict[str, Any]) -> Finding:
    """Whether latents answer more questions than text does in as many rounds."""
    cells, words, hold = _by(record, "mode", "rounds"), [], []
    for rounds in (1, 2, 3):
        gain = change(_right(cells["text", rounds]), _right(cells["latent", rounds]))
        words.append(f"r = {rounds}: {_difference(gain)}")
        hold.append(gain.shown and gain.value > 0)
    return Finding(f"{_of_seeds(record)}latents minus text (97.5% each), {'; '.join(words)}", verdict_of(hold))


def faster(record: dict[str, Any]) -> Finding:
    """Whether latents take less time than text in as many rounds, beyond chance."""
    cells, words, hold = _by(record, "mode", "rounds"), [], []
    for rounds in (1, 2, 3):
        text, latent = (_seconds(cells[mode, rounds]) for mode in ("text", "latent"))
        ratio = Ratio.of(text, latent)
        each = " and ".join(duration(1e6 * statistics.median(times)) for times in (text, latent))
        words.append(f"r = {rounds}: {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] ({each} a question)")
        hold.append(ratio.low > 1)
    return Finding("; ".join(words), verdict_of(hold))


def fewer_tokens(record: dict[str, Any]) -> Finding:
    """Whether latents write fewer tokens of text in as many rounds; latent steps are not counted, as in the paper."""
    cells, words, hold = _by(record, "mode", "rounds"), [], []
    for rounds in (1, 2, 3):
        text, latent = cells["text", rounds], cells["latent", rounds]
        before, after = (_mean(of_mode, "text_tokens") for of_mode in (text, latent))
        less, steps = 1 - after / before, _mean(latent, "latent_steps")
        words.append(f"r = {rounds}: {100 * less:.0f}% less, {before:.1f} to {after:.1f} and {steps:.1f} latent steps")
        hold.append(less > 0)
    return Finding("; ".join(words), verdict_of(hold))


def settles(record: dict[str, Any]) -> Finding:
    """Whether rounds that end by themselves lose no answer that four rounds for all give, and take less time."""
    cells = _by(record, "mode", "settle", "rounds")
    auto, most, words = cells["latent", SETTLED, 4], cells["latent", None, 4], []
    gain, ratio = change(_right(most), _right(auto)), Ratio.of(_seconds(most), _seconds(auto))
    for name, way in ((f"auto at {SETTLED}", auto), ("4 rounds", most), ("3 rounds", cells["latent", None, 3])):
        took = statistics.fmean(statistics.fmean(cell["took"]) for cell in way)
        words.append(f"{name}: {_share(way)} in {took:.2f} rounds, {_mean(way, 'latent_steps'):.1f} latent steps")
    beside = f"auto minus 4 rounds: {_difference(gain)}, {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] as fast"
    lost = gain.shown and gain.value < 0
    return Finding(f"{_of_seeds(record)}{'; '.join(words)}; {beside}", verdict_of([not lost, ratio.low > 1]))


def beats_the_loop(record: dict[str, Any]) -> Finding:
    """Whether the system answers more than its answering agent does looped, in as many rounds as passes."""
    cells, words, hold = _by(record, "system", "rounds"), [], []
    for rounds in (1, 2, 3):
        system, looped = (cells[name, rounds] for name in ("system", "looped"))
        gain = change(_right(looped), _right(system))
        words.append(f"r = {rounds}: {_share(system)}, looped {_share(looped)}, {_difference(gain)}")
        hold.append(gain.shown and gain.value > 0)
    return Finding(f"{_of_seeds(record)}{'; '.join(words)} (97.5% each)", verdict_of(hold))


def grows_with_steps(record: dict[str, Any]) -> Finding:
    """Whether 16 latent steps answer more than none, and 80 more than 16."""
    right = {steps: _right(cells) for (steps,), cells in _by(record, "steps").items()}
    shares = ", ".join(
        f"{statistics.fmean(map(statistics.fmean, each)):.3f} at {steps}" for steps, each in right.items()
    )
    ends = [change(right[few], right[many]) for few, many in ((0, 16), (16, 80))]
    words = f"{shares}; 16 minus 0: {_difference(ends[0])}, 80 minus 16: {_difference(ends[1])}"
    return Finding(_of_seeds(record) + words, verdict_of([one.shown and one.value > 0 for one in ends]))


def deep_is_best(record: dict[str, Any]) -> Finding:
    """Whether links trained in three rounds answer more in three rounds than links trained in one do."""
    shares: dict[tuple[int, int], list[float]] = {}
    for cell in sorted(record["cells"], key=lambda cell: cell["link_seed"]):
        share = sum(cell["correct"]) / len(cell["correct"])
        shares.setdefault((cell["trained"], cell["rounds"]), []).append(share)
    table = [
        f"{'warmed up only' if not trained else f'trained r = {trained}'}: "
        + ", ".join(f"{statistics.mean(shares[trained, rounds]):.3f}" for rounds in (1, 2, 3))
        for trained in sorted({trained for trained, _ in shares})
    ]
    gains = {few: _over_seeds(shares[3, 3], shares[few, 3]) for few in (1, 2)}
    words = "; ".join(f"asked in 3, trained in 3 minus in {few}: {_difference(one)}" for few, one in gains.items())
    seeds = f"means of {len(shares[3, 3])} link seeds at inference r = 1, 2, 3"
    return Finding(f"{seeds}: {'; '.join(table)}. {words}", HOLDS if gains[1].low > 0 else FAILS)


def _over_seeds(many: Sequence[float], few: Sequence[float]) -> Difference:
    """The mean difference over link seeds, with Student's 95 % interval."""
    differences = [one - other for one, other in zip(many, few, strict=True)]
    mean = statistics.mean(differences)
    reach = STUDENT[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(mean, mean - reach, mean + reach)


def released_is_best(record: dict[str, Any]) -> Finding:
    """Whether links of two layers with a residual answer more than the paper's other kinds, after each training."""
    words, hold = [], []
    for trained, kinds in _ablated(record).items():
        gains = {name: _crossed(kinds[name], kinds[_RELEASED]) for name in kinds if KINDS[name].layers < 3}
        del gains[_RELEASED]
        words.append(f"{trained}: {_means(kinds)}; {_RELEASED} minus {_gains_over(gains)}")
        hold += [gain.low > 0 for gain in gains.values()]
    return Finding(f"{_seeds(record)}. {'. '.join(words)}", verdict_of(hold))


def third_layer_helps(record: dict[str, Any]) -> Finding:
    """Whether links of three layers with a residual answer more than those of two, after each training."""
    gains = {trained: _crossed(kinds[_RELEASED], kinds[_DEEPER]) for trained, kinds in _ablated(record).items()}
    words = f"{_DEEPER} minus {_RELEASED}, {_gains_over(gains)}"
    hold = [gain.low > 0 for gain in gains.values()]
    told = any(hold) or any(gain.high < 0 for gain in gains.values())
    return Finding(words, verdict_of(hold) if told else UNTOLD)


def residual_helps(record: dict[str, Any]) -> Finding:
    """Whether links with a residual answer more than those of as many layers without, after each training."""
    words, hold = [], []
    for trained, kinds in _ablated(record).items():
        gains = {name: _crossed(kinds[name], kinds[f"{_WITH}{name}"]) for name in kinds if f"{_WITH}{name}" in kinds}
        words.append(f"{trained}: {_gains_over(gains)}")
        hold += [gain.low > 0 for gain in gains.values()]
    return Finding(f"with minus without, {'; '.join(words)}", verdict_of(hold))


_WITH, _RELEASED, _DEEPER = "residual + ", "residual + 2 layers", "residual + 3 layers"


def _ablated(record: dict[str, Any]) -> dict[str, dict[str, Seeds]]:
    """What was right, by training, kind of links and link seed.

    Raises:
        ValueError: a kind of links lacks a seed that others have.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    seeds: dict[str, set[int]] = {}
    for cell in sorted(record["cells"], key=lambda cell: cell["link_seed"]):
        found.setdefault(cell["trained"], {}).setdefault(cell["links"], []).extend(_right([cell]))
        seeds.setdefault(cell["links"], set()).add(cell["link_seed"])
    for name, its in seeds.items():
        if missing := set.union(*seeds.values()) - its:
            raise ValueError(f"ablations: links of {name!r} lack link seed {min(missing)}, which others have")
    return {trained: {name: kinds[name] for name in KINDS if name in kinds} for trained, kinds in found.items()}


def _means(kinds: dict[str, Seeds]) -> str:
    return ", ".join(f"{name} {statistics.fmean(map(statistics.fmean, right)):.3f}" for name, right in kinds.items())


def _gains_over(gains: dict[str, Difference]) -> str:
    return ", ".join(f"{name} {_difference(gain)}" for name, gain in gains.items())


def _seeds(record: dict[str, Any]) -> str:
    return f"means of {len({cell['link_seed'] for cell in record['cells']})} link seeds in {record['rounds']} rounds"


def _crossed(few: Seeds, many: Seeds) -> Difference:
    """The mean difference of the same seeds and questions, with its 95 % interval over both."""
    pairs = zip(few, many, strict=True)
    return Difference(*crossed([[b - a for a, b in zip(*one, strict=True)] for one in pairs]))


KEPT = 2
"""A norm that is at most so many times as large or small as before counts as kept."""


def agents_keep_gradients(record: dict[str, Any]) -> Finding:
    """Whether a round's Jacobian keeps the norm of a random direction, by kind of link."""
    gains = {kind: _gains(record, kind) for kind in dict.fromkeys(cell["links"] for cell in record["cells"])}
    words = "; ".join(f"{kind} {_spread(each)}" for kind, each in gains.items())
    through = {kind: statistics.median(each) for kind, each in gains.items() if kind != "text"}
    measured = f"gain of a round, median [5%, 95%] of questions, rounds and directions: {words}"
    return Finding(measured, verdict_of([1 / KEPT <= median <= KEPT for median in through.values()]))


def agents_lose_gradients_in_text(record: dict[str, Any]) -> Finding:
    """Whether a round of text passes less of a gradient on than a round of links, by kind of link."""
    text = statistics.median(_gains(record, "text"))
    through = {
        kind: statistics.median(_gains(record, kind))
        for kind in dict.fromkeys(cell["links"] for cell in record["cells"])
        if kind != "text"
    }
    (entropies,) = [cell["entropy"] for cell in record["cells"] if cell["links"] == "text"]
    nats = ", ".join(f"{role} {number(entropy)}" for role, entropy in entropies.items())
    words = ", ".join(f"{number(median / text)} times as much through {kind} links" for kind, median in through.items())
    return Finding(
        f"{words} as through text, whose entropies in nats are: {nats}",
        verdict_of([median > text for median in through.values()]),
    )


def _gains(record: dict[str, Any], kind: str) -> list[float]:
    """Of all seeds, rounds, questions and directions."""
    return [one for cell in record["cells"] if cell["links"] == kind for by_round in cell["gains"] for one in by_round]


def _spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.05, 0.95))
    return f"{number(statistics.median(ordered))} [{number(low)}, {number(high)}]"


Judge = Callable[[Any], Finding]
CLAIMS: tuple[tuple[str, str, str, Judge], ...] = (
    ("Accuracy grows with rounds.", "Table 2, accuracy", "table2", grows_with_rounds),
    ("Latents are more accurate than text in as many rounds.", "Table 2, accuracy", "table2", more_accurate),
    ("Latents are faster than text in as many rounds.", "Table 2, time", "table2", faster),
    ("Latents write fewer tokens than text in as many rounds.", "Table 2, tokens", "table2", fewer_tokens),
    (
        "Links trained in more rounds answer more in as many rounds.",
        "Figure 1",
        "depth",
        deep_is_best,
    ),
    (
        "Agents that exchange latents answer more than one of them that is looped (it has its own sheet alone).",
        "Table 3, LoopLM",
        "loop",
        beats_the_loop,
    ),
    (
        "Two layers with a residual connection are the best link (of one or two, after equally short trainings).",
        "Table 4",
        "ablations",
        released_is_best,
    ),
    ("A residual connection helps links of any depth.", "Table 4", "ablations", residual_helps),
    ("A third layer makes a better link.", "beyond Table 4", "ablations", third_layer_helps),
    ("Accuracy grows with the number of latent steps up to about 80.", "Table 9", "steps", grows_with_steps),
    (
        "A question whose rounds end once its latents have settled is answered as well, in less time.",
        "this library",
        "auto",
        settles,
    ),
    (
        "Gradients keep their norm through links and the frozen models between them.",
        "Theorem 4.1",
        "gradients",
        agents_keep_gradients,
    ),
    (
        "Through frozen models, too, links pass on more of a gradient than text does.",
        "Theorem 4.1",
        "gradients",
        agents_lose_gradients_in_text,
    ),
)
"""Claim, where the paper makes it, the step of `benchmarks.relay` that measures it, and what its record says."""
