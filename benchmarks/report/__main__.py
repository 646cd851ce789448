"""``python -m benchmarks.report [RUN.json ...]``: store runs, and draw tables and plots from what is stored.

A run is what ``pytest benchmarks --grid full --benchmark-json=RUN.json`` wrote, or ``--records RUN.json`` on a GPU.
Each suite of it replaces ``benchmarks/results/<device>/<suite>.json``; then every device's tables and plots are drawn
anew, with them the README's tables between its two markers, and ``docs/results.md``: every claim and its verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import gpu_tables, plots, tables
from benchmarks.report.pages import headline, page, title
from benchmarks.report.results_page import html_page, results_page
from benchmarks.report.stored import GPU, RESULTS, load, store
from recmas.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def draw(results: Path, readme: Path) -> None:
    """Write every device's page and plots, and the README's part where it has the markers: one CPU's table, GPUs'."""
    headlines, machines = [], {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        suites = load(folder)
        if not suites:
            continue
        if GPU in suites:
            write_atomically(folder / "README.md", gpu_tables.summary(suites[GPU]))
            headlines.append(gpu_tables.headline(suites[GPU], folder.name))
            continue
        device = next(iter(suites.values()))["device"]
        heading = title(device)
        if "link" in suites and tables.headline_records(suites["link"]["records"]):
            plots.link_plot(suites["link"]["records"], folder / "link.svg", heading)
        if "handoff" in suites:
            plots.handoff_plot(suites["handoff"]["records"], folder / "handoff.svg", heading)
        write_atomically(folder / "README.md", page(suites))
        machines[folder.name] = suites
    if machines:
        headlines.insert(0, headline(machines))
    text = readme.read_text(encoding="utf-8")
    if headlines and BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(readme, before + BEGIN + "\n\n" + "\n\n".join(headlines) + "\n\n" + END + after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="JSON files of full runs to store first")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the stored results")
    parser.add_argument(
        "--page", type=Path, help="file of claims and verdicts; default: docs/results.md, or beside other results"
    )
    parser.add_argument("--html", type=Path, help="write that page with all plots into this file, too")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file that holds the two markers")
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            store(run, options.results)
        draw(options.results, options.readme)
        page_of_claims = ROOT / "docs" / "results.md" if options.results == RESULTS else options.results / "results.md"
        write_atomically(options.page or page_of_claims, results_page(options.results))
        if options.html is not None:
            write_atomically(options.html, html_page(options.results))
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
