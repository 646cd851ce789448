"""Records as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.names import AGAIN, FUSED, PRODUCTS
from benchmarks.harness.timing import Ratio

Record = Mapping[str, Any]
HEADLINE_SHAPE = "2048x2048x2048"
HEADLINE_TOKENS = (1, 32, 512)
HEADLINE_VOCABULARY = "|V|=32000"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many significant digits, never in exponent form; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def duration(microseconds: float) -> str:
    """A time with its unit."""
    return f"{number(microseconds)} µs" if microseconds < 1000 else f"{number(microseconds / 1000)} ms"


def unmeasured_in(record: Record) -> Mapping[str, Any]:
    """The record's peers without times; records of earlier runs have none."""
    found: Mapping[str, Any] = record.get("unmeasured", {})
    return found


def ratio_text(record: Record, peer: str, interval: bool = True) -> str:
    """Speed-up over ``peer``: "≈ 1" where its interval reaches into the run's own noise, "> 20×" for a peer that is
    over its time bound, "not run" where the bound of another settled that, a dash for no such peer."""
    if (left_out := unmeasured_in(record).get(peer)) is not None:
        return "not run" if left_out["at_least"] is None else f"> {number(left_out['at_least'], 2)}×"
    if peer not in record["ratios"]:
        return "–"
    ratio = Ratio(**record["ratios"][peer])
    if ratio.is_within(record["noise"]):
        return "≈ 1"
    return f"{ratio.value:.2f}×" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if interval else "")


def goal_text(record: Record) -> str:
    goal = record["goal"]
    if goal is None:
        return "–"
    wanted = f"≥ {goal['must']:.2f}× {goal['peer']}"
    if goal["must_us"] is not None:
        wanted += f", ≤ {goal['must_us']:g} µs"
    if goal.get("must_memory") is not None:
        wanted += f", {goal['must_memory']:.2f}× less memory"
    if record["missed"]:
        return f"{wanted}: **missed**"
    aim = goal["aim"]
    if aim is None:
        return f"{wanted}: met"
    left_out = unmeasured_in(record).get(goal["peer"])
    speed_up = record["ratios"][goal["peer"]]["value"] if left_out is None else left_out["at_least"]
    reached = speed_up >= aim
    return f"{wanted}: met, aim {aim:.2f}× " + ("too" if reached else "not")


def peers_of(records: Iterable[Record]) -> list[str]:
    """Every peer that occurs, with times or without, in the order of first occurrence."""
    return list(dict.fromkeys(peer for record in records for peer in peers_in(record)))


def peers_in(record: Record) -> list[str]:
    """One record's peers, those without times last; the library's bare products are none."""
    return [name for name in (*record["ratios"], *unmeasured_in(record)) if name != PRODUCTS]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def full_table(records: Sequence[Record]) -> str:
    """All columns of a suite's records, one row each."""
    peers = peers_of(records)
    read = any(record["impls"][FUSED].get("read_ceiling_pct") for record in records)
    ceilings = ("gemm_ceiling_pct", "read_ceiling_pct") if read else ("gemm_ceiling_pct",)
    header = [
        *("op", "shape", "dtype", "pass", "tokens", "cache", "time µs p20 / p50 / p80 (n)"),
        *("floor µs, bound", "% of floor", "% of library products", *(["% of bare reads"] if read else [])),
        *("GFLOP/s", "GB/s"),
        *("operators", "peak MB", "error", *(f"vs {peer}" for peer in peers), "noise", "goal"),
    ]
    rows = []
    for record in records:
        fused = record["impls"][FUSED]
        time = fused["t_us"]
        rows.append(
            [
                *(str(record[key]) for key in ("op", "shape", "dtype", "pass", "tokens", "cache")),
                f"{number(time['p20'])} / {number(time['p50'])} / {number(time['p80'])} ({time['n']})",
                f"{number(record['floor_us'])}, {record['bound']}",
                *(number(fused.get(key)) for key in ("sol_pct", *ceilings, "gflops", "gbps")),
                *(number(fused.get(key)) for key in ("launches", "peak_mem_mb")),
                "–" if fused["err"] is None else f"{fused['err']:.1e}",
                *(ratio_text(record, peer) for peer in peers),
                f"±{100 * (record['noise'] - 1):.1f}%",
                goal_text(record),
            ]
        )
    return table(header, rows)


def peer_table(records: Sequence[Record]) -> str:
    """Median time and error of every implementation."""
    names = list(
        dict.fromkeys(
            name for record in records for name in (*record["impls"], *unmeasured_in(record)) if AGAIN not in name
        )
    )
    header = ["shape", "dtype", "pass", "tokens", "cache", *(f"{name}, µs (error)" for name in names)]
    rows = []
    for record in records:
        cells = []
        for name in names:
            if (left_out := unmeasured_in(record).get(name)) is not None:
                cells.append("not run" if left_out["seconds"] is None else f"> {number(left_out['seconds'] * 1e6)}")
                continue
            entry = record["impls"].get(name)
            error = "" if entry is None or entry["err"] is None else f" ({entry['err']:.0e})"
            cells.append("–" if entry is None else number(entry["t_us"]["p50"]) + error)
        rows.append([*(str(record[key]) for key in ("shape", "dtype", "pass", "tokens", "cache")), *cells])
    return table(header, rows)


def unmeasured_list(records: Sequence[Record]) -> str:
    """One line per record that has peers without times: which, and why; empty if there is none."""
    lines = []
    for record in records:
        if left_out := unmeasured_in(record):
            why = "; ".join(f"{name}: {peer['reason']}" for name, peer in left_out.items())
            where = f"{record['op']} {record['shape']} {record['dtype']} {record['pass']} T={record['tokens']}"
            lines.append(f"- {where} ({record['cache']}): {why}")
    return "\n".join(lines)


def headline_records(records: Iterable[Record]) -> list[Record]:
    """The released inner link, forward without grad, caches not emptied."""
    return [
        record
        for record in records
        if record["shape"] == HEADLINE_SHAPE and record["pass"] == "forward" and record["cache"] != "cold"
    ]


def headline(suites: Mapping[str, Sequence[Record]]) -> str:
    """The README's table: three sizes per dtype of the `headline_records`, and one record of each other suite."""
    chosen = [record for record in headline_records(suites.get("link", ())) if record["tokens"] in HEADLINE_TOKENS]
    for name, records in suites.items():
        timed = [record for record in records if "impls" in record]
        if name != "link" and timed:
            chosen.append(next((record for record in timed if HEADLINE_VOCABULARY in record["shape"]), timed[0]))
    rows = []
    for record in chosen:
        what = f"{record['op']}, {record['shape']}, {record['tokens']} tokens, {record['pass']}"
        against = "; ".join(f"{ratio_text(record, peer, interval=False)} {peer}" for peer in peers_in(record))
        rows.append([what, record["dtype"], duration(record["impls"][FUSED]["t_us"]["p50"]), against])
    return table(["what", "dtype", "time", "speed-up over"], rows)


def fit_table(records: Sequence[Record]) -> str:
    """How times grow, a row per term: sizes and times at both ends, exponent, and what it must be."""
    rows = []
    for record in records:
        if "sizes" not in record:
            continue
        fit, (first, *_, last) = record["fit"], record["seconds"]
        if fit is None:
            wanted = "must grow: the negative control" if record["control"] else "must stay"
            exponent, explained = "–", "–"
        else:
            wanted = f"{record['expected']} ± {record['goal']['within']}"
            exponent = f"{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
            explained = f"{fit['r2']:.4f}"
        sizes = f"{record['factor']} = {record['sizes'][0]} to {record['sizes'][-1]}"
        times = f"{duration(first * 1e6)} to {duration(last * 1e6)} ({record['growth']:.2f}×)"
        state = "**missed**" if record["missed"] else "met"
        rows.append([record["op"], sizes, times, exponent, explained, f"{wanted}: {state}"])
    return table(["what", "over", "time", "exponent", "R²", "goal"], rows)


def whole_table(record: Record) -> str:
    """The coefficients of the whole model, and text against latent turns at equal m."""
    rows = []
    for term in record["terms"]:
        value, low, high = (number(term[key] * 1e9) for key in ("coefficient", "low", "high"))
        rows.append([term["name"], value, f"{low} to {high}"])
    terms = table(["term", "ns per unit", "95% interval"], rows)
    turns = record["turns"]
    ratios = [turn["text"] / turn["latent"] for turn in turns]
    least, most = (turns[ratios.index(pick(ratios))] for pick in (min, max))

    def in_words(turn: Mapping[str, Any]) -> str:
        sizes = f"d={turn['features']}, |V|={turn['vocabulary']}, t={turn['prompt']}, m={turn['steps']}"
        return f"{turn['text'] / turn['latent']:.2f}× ({sizes})"

    parts = [
        f"All terms at once, non-negative least squares over {2 * len(turns)} whole turns, R² {record['r2']:.4f}:",
        terms,
        f"The head takes {record['head_over_least']:.2f} times that of reading its weights at the measured rate. "
        f"Removing it is worth, in whole turns at equal m, from {in_words(least)} to {in_words(most)}.",
    ]
    return "\n\n".join(parts)


def goals(records: Iterable[Record]) -> str:
    """How many goals are met, and every one that is missed."""
    claimed = [record for record in records if record["goal"] is not None]
    missed = [record for record in claimed if record["missed"]]
    lines = [f"{len(claimed) - len(missed)} of {len(claimed)} goals met."]
    for record in missed:
        where = f"{record['op']} {record['shape']} {record['dtype']} {record['pass']} T={record['tokens']}"
        lines.append(f"- missed: {where} ({record['cache']}): {record['missed']}")
    return "\n".join(lines)
