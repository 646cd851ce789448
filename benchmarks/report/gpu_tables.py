"""``python -m benchmarks.report.gpu_tables RUN.json...``: GPU runs as Markdown, the forecast's rows first."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.gpu.forecast import ROWS, misses, verdict
from benchmarks.harness.names import FUSED
from benchmarks.report.tables import number, ratio_text, table

FORECAST_PEERS = ("eager", "compile", "compile-max", "as released")
HEADLINE_ROWS = 8  # of a GPU's part of the README
MOST_LEFT_OUT = 12  # names of cells in the short summary


def _range(span: Sequence[float] | None) -> str:
    if span is None:
        return "–"
    low, high = span
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def forecast_table(records: Sequence[Mapping[str, Any]], device: str) -> str:
    """Every row of the forecast: what was forecast, what was measured, and whether it hit."""
    found = {record["forecast"]["row"]: record for record in records if record.get("forecast")}
    header = ["row", "floor µs", "ours µs: forecast", "measured", "% of floor"]
    header += [f"{peer} µs: forecast, measured" for peer in FORECAST_PEERS]
    header += ["over eager", "over compile", "over compile-max", "verdict"]
    rows = []
    for name, row in ROWS.items():
        record = found.get(name)
        if record is None:
            blank = ["–"] * (len(header) - 4)
            rows.append([name, f"{row.floor_us:g} (arithmetic)", _range(row.ours_us), *blank, "not measured"])
            continue
        impls, fused = record["impls"], record["impls"][FUSED]
        peers = [
            f"{_range(row.peers_us.get(peer))}, {number(impls[peer]['t_us']['p50'])}" if peer in impls else "–"
            for peer in FORECAST_PEERS
        ]
        ratios = [ratio_text(record, peer, interval=False) for peer in ("eager", "compile", "compile-max")]
        times = [
            number(record["floor_us"]),
            _range(row.ours_us),
            number(fused["t_us"]["p50"]),
            number(fused["sol_pct"]),
        ]
        rows.append([name, *times, *peers, *ratios, verdict(record)])
    missing = "" if found else f"The forecast is for an H100; no row of it was measured on {device}.\n\n"
    return missing + table(header, rows)


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """One row per answer: the median of every variant, and further facts."""
    rows = []
    for answer in answers:
        times = answer.get("t_us", {})
        facts = [f"{name} {number(time['p50'])} µs" for name, time in times.items()]
        for key, value in answer.items():
            if isinstance(value, int | float):
                facts.append(f"{key} {number(value)}")
            elif isinstance(value, str) and key not in ("question", "what"):
                facts.append(f"{key}: {value}")
        facts += [f"{name} failed ({reason})" for name, reason in answer.get("failed", {}).items()]
        rows.append([answer["question"], answer["what"], "; ".join(facts)])
    return table(["question", "case", "medians"], rows)


def hits(records: Sequence[Mapping[str, Any]]) -> str:
    """How many rows of the forecast were measured, and how many of them hit."""
    judged = {record["forecast"]["row"]: record for record in records if record.get("forecast")}.values()
    hit = sum(not misses(record["forecast"], record) for record in judged)
    return f"{len(judged)} of {len(ROWS)} rows of the forecast measured, {hit} hit"


def summary(suite: Mapping[str, Any]) -> str:
    """The page of a GPU run (its head, and its ``records``): the forecast, the other cells, answers, what is left."""
    device, records = suite["device"], suite["records"]
    versions = ", ".join(f"{name} {version}" for name, version in suite["versions"].items())
    commit = f"{suite['git']['commit']}{' with local changes' if suite['git']['dirty'] else ''}"
    parts = [
        f"# {device['name']}",
        f"{device['sms']} SMs, {device['l2_bytes'] >> 20} MiB L2, driver {device['driver']}, CUDA {device['cuda']}; "
        f"{versions}; commit {commit}; {suite['date']}. How to read it: `benchmarks/README.md`.",
        f"Limits in the same run: {limits(suite['limits'])}.",
        f"## Forecast\n\n{hits(records)}.\n\n{forecast_table(records, device['name'])}",
    ]
    others = [record for record in records if not record.get("forecast")]
    if others:
        parts.append("## Other cells\n\n" + cells_table(others))
    if suite["answers"]:
        parts.append("## Measured first\n\n" + answers_table(suite["answers"]))
    if suite["not_run"]:
        names = list(suite["not_run"])
        more = f" and {len(names) - MOST_LEFT_OUT} more" if len(names) > MOST_LEFT_OUT else ""
        parts.append(f"{len(names)} cells were not run, for want of time: {', '.join(names[:MOST_LEFT_OUT])}{more}.")
    return "\n\n".join(parts) + "\n"


def headline(suite: Mapping[str, Any], slug: str) -> str:
    """The README's part of a GPU: the first rows of the forecast that were measured; cells run in order of weight."""
    device, records = suite["device"], suite["records"]
    link = f"[benchmarks/results/{slug}](benchmarks/results/{slug}/README.md)"
    measured = [record for record in records if record.get("forecast")]
    intro = f"{device['name']}, torch {suite['versions']['torch']}; all columns and cells: {link}."
    return "\n\n".join([intro, cells_table((measured or records)[:HEADLINE_ROWS])])


def limits(measured: Mapping[str, Mapping[str, float]]) -> str:
    stream = [f"{name} {number(rate)} GB/s" for name, rate in measured["stream_gbps"].items()]
    product = [f"{dtype} products {number(rate / 1e3)} TFLOP/s" for dtype, rate in measured["product_gflops"].items()]
    return ", ".join(stream + product) or "none measured"


def cells_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One short row per cell that no forecast covers."""
    rows = []
    for record in records:
        fused = record["impls"][FUSED]
        against = "; ".join(f"{ratio_text(record, peer, interval=False)} {peer}" for peer in record["ratios"])
        if (tuned := record["impls"].get("tuned")) is not None:
            against += f"; tuned, {number(tuned['gemm_ceiling_pct'])} % of library products"
        cell = f"{record['op']} {record['shape']}, {record['dtype']}, {record['pass']}, T={record['tokens']}"
        state = f"{record['cache']}, {'graph' if record['graph'] else 'bare'}"
        shares = [number(fused["sol_pct"]), number(fused["gemm_ceiling_pct"])]
        rows.append([record["suite"], cell, state, number(fused["t_us"]["p50"]), *shares, against])
    return table(["suite", "cell", "state", "µs", "% of floor", "% of library products", "speed-up"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.gpu_tables", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="file that --records wrote")
    status = 0
    for path in parser.parse_args(arguments).runs:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            records = [entry["extra_info"]["record"] for entry in run["benchmarks"]]
            print(summary(run["recmas"] | {"records": records}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"error: {path} is no GPU run: {type(error).__name__}: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
