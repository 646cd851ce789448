"""``python -m benchmarks.report [RUN.json ...]``: store runs, and draw tables and plots from what is stored.

A run is what ``pytest benchmarks --grid full --benchmark-json=RUN.json`` wrote, or ``--records RUN.json`` on a GPU.
Each suite of it replaces ``benchmarks/results/<device>/<suite>.json``; then every device's tables and plots are drawn
anew, and with them the README's tables between its two markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, tables
from benchmarks.gpu import tables as gpu_tables
from benchmarks.record import SCHEMA
from recmas.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
GPU = "gpu"  # the kind of a device, and the one results file of such a device
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ORDER = ("link", "overhead", "alignment", "rollout", "system", "training", "handoff", "complexity")


def store(run: Path, results: Path) -> None:
    """Put the records of a run into ``results``, one file per suite (of a GPU run all in one), each replaced whole.

    Raises:
        ValueError: the file is no such run, of another schema, or of the quick grid.
    """
    try:
        content = json.loads(run.read_text(encoding="utf-8"))
        meta = content["recmas"]
        records = [entry["extra_info"]["record"] for entry in content["benchmarks"] if entry["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not a benchmark run: {type(error).__name__}: {error}") from error
    if meta["schema"] != SCHEMA:
        raise ValueError(f"{run} has schema {meta['schema']}, expected {SCHEMA}")
    if meta["grid"] != "full":
        raise ValueError(f"{run} is of the {meta['grid']} grid, whose times mean nothing: run with --grid full")
    folder = results / meta["device"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    suites = defaultdict(list)
    for record in records:
        suites[GPU if _is_gpu(meta) else record["suite"]].append(record)
    for suite, members in suites.items():
        head = json.dumps(meta, indent=1)[1:-2].strip()
        lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in members)
        write_atomically(folder / f"{suite}.json", "{" + head + ',\n "records": [\n' + lines + "\n]}\n")


def _is_gpu(head: dict[str, Any]) -> bool:
    return head["device"].get("kind") == GPU


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The stored suites of a device, by name, in the order of the report."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    return {name: found[name] for name in sorted(found, key=lambda name: (*ORDER, name).index(name))}


def page(suites: dict[str, dict[str, Any]]) -> str:
    """A device's page: where the numbers come from, the goals, and every table."""
    device = next(iter(suites.values()))["device"]
    parts = [
        f"# {device['name']}, {device['threads']} threads",
        "Drawn by `python -m benchmarks.report` from the JSON files beside it; how to read it: `benchmarks/README.md`.",
        f"Caches {device['caches']}, instruction set {device['instruction_set']['used']}.",
        tables.goals(record for suite in suites.values() for record in suite["records"]),
    ]
    for name, suite in suites.items():
        limits, git = suite["limits"], suite["git"]
        stream = ", ".join(f"{size} {tables.number(rate)}" for size, rate in limits["stream_gbps"].items())
        product = ", ".join(f"{dtype} {tables.number(rate)}" for dtype, rate in limits["product_gflops"].items())
        parts += [
            f"## {name}",
            f"Measured {suite['date']} at commit {git['commit']}{' with local changes' if git['dirty'] else ''}, "
            + ", ".join(f"{package} {version}" for package, version in suite["versions"].items())
            + f". Limits in the same run: streaming reads, GB/s by buffer: {stream}; products, GFLOP/s: {product}.",
        ]
        if name == "link" and tables.headline_records(suite["records"]):
            parts.append("![time against tokens](link.svg)")
        if name == "handoff":
            parts.append("![text against latent handoff](handoff.svg)")
        parts += _tables(name, suite["records"])
    return "\n\n".join(parts) + "\n"


def _tables(name: str, records: Sequence[tables.Record]) -> list[str]:
    if name == "complexity":
        return [tables.fit_table(records), *(tables.whole_table(record) for record in records if "turns" in record)]
    return [tables.full_table(records), "Every implementation, median:", tables.peer_table(records)]


def headline(suites: dict[str, dict[str, Any]], slug: str) -> str:
    """The README's part: the released inner link in full, one line for every cell of the smaller suites."""
    suite = next(iter(suites.values()))
    device = suite["device"]
    parts = [
        f"{device['name']}, {device['threads']} threads, torch {suite['versions']['torch']}; "
        f"all columns and cells: [benchmarks/results/{slug}](benchmarks/results/{slug}/README.md)."
    ]
    if "link" in suites and tables.headline_records(suites["link"]["records"]):
        parts += [
            f"![time against tokens](benchmarks/results/{slug}/link.svg)",
            tables.headline_link(suites["link"]["records"]),
        ]
    rest = [record for name, suite in suites.items() if name != "link" for record in suite["records"]]
    if rest:
        parts.append(tables.headline_rest(rest))
    if "complexity" in suites:
        parts += [
            "How text and latent turns grow (proposition 3.1):",
            tables.fit_table(suites["complexity"]["records"]),
        ]
    parts.append(tables.goals(record for suite in suites.values() for record in suite["records"]))
    return "\n\n".join(parts)


def draw(results: Path, readme: Path) -> None:
    """Write every device's page and plots, and the README's part where it has the markers."""
    headlines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        suites = load(folder)
        if not suites:
            continue
        if GPU in suites:
            write_atomically(folder / "README.md", gpu_tables.summary(suites[GPU]))
            headlines.append(gpu_tables.headline(suites[GPU], folder.name))
            continue
        device = next(iter(suites.values()))["device"]
        title = f"{device['name']}, {device['threads']} threads"
        if "link" in suites and tables.headline_records(suites["link"]["records"]):
            plots.link_plot(suites["link"]["records"], folder / "link.svg", title)
        if "handoff" in suites:
            plots.handoff_plot(suites["handoff"]["records"], folder / "handoff.svg", title)
        write_atomically(folder / "README.md", page(suites))
        headlines.append(headline(suites, folder.name))
    text = readme.read_text(encoding="utf-8")
    if headlines and BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(readme, before + BEGIN + "\n\n" + "\n\n".join(headlines) + "\n\n" + END + after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="JSON files of full runs to store first")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the stored results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file that holds the two markers")
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            store(run, options.results)
        draw(options.results, options.readme)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in sorted(path for path in options.results.iterdir() if path.is_dir()):
        suites = load(folder)
        records = [record for suite in suites.values() for record in suite["records"]]
        print(f"{folder / 'README.md'}: {gpu_tables.hits(records) if GPU in suites else tables.goals(records)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
