"""``docs/results.md``: every claim, what was measured of it on each machine, and the verdict; as one HTML page, too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.claims import CLAIMS, UNMEASURED, Claim
from benchmarks.report.evidence import STATEMENTS
from benchmarks.report.pages import title
from benchmarks.report.stored import GPU, load
from benchmarks.report.tables import table

STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse }
td, th { border: 1px solid #bbb; padding: .3em .6em; text-align: left; vertical-align: top }
svg { max-width: 100%; height: auto }"""


def results_page(results: Path) -> str:
    """The page as Markdown, from all that is stored."""
    machines = {
        title(next(iter(suites.values()))["device"]): (folder.name, suites)
        for folder in sorted(path for path in results.iterdir() if path.is_dir())
        if (suites := load(folder)) and GPU not in suites
    }
    parts = [
        "# Results",
        "Every claim with what was measured of it, those that fail, too; `python -m benchmarks.report` draws it from "
        "the records in `benchmarks/results`, which hold every sample; a test draws every verdict anew from these. "
        "Intervals are 95%. A claim in several cells holds if it holds in each.",
    ]
    for heading, of_paper in (("Claims of the paper", True), ("Claims of this library", False)):
        parts.append(f"## {heading}")
        claims = [claim for claim in CLAIMS if bool(claim.source) is of_paper]
        for claim in claims:
            rows = list(_rows(claim, machines))
            source = f" ({claim.source})" if claim.source else ""
            parts.append(f"**{claim.text}**{source} `{claim.command}`")
            parts.append(table(["machine", "measured", "verdict", "record"], rows) if rows else "Not measured.")
        parts += list(_evidence(results)) if of_paper else []
    parts += [
        "## Not measured",
        table(["claim of the paper", "where"], UNMEASURED),
        "No GPU has run any of this: there is no record of one.",
    ]
    return "\n\n".join(parts) + "\n"


def html_page(results: Path) -> str:
    """The page and all plots in one file that needs no other."""
    import markdown  # comes with the documentation's tools

    body = markdown.markdown(results_page(results), extensions=["tables"])
    plots = "".join(
        f"<h2>{path.parent.name}: {path.stem}</h2>{svg[svg.index('<svg') :]}"
        for path in sorted(results.glob("*/*.svg"))
        if "<svg" in (svg := path.read_text(encoding="utf-8"))
    )
    head = f'<meta charset="utf-8"><title>Results</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}{plots}</html>\n'


def _rows(claim: Claim, machines: Mapping[str, tuple[str, dict[str, Any]]]) -> Iterator[list[str]]:
    for name, (folder, suites) in machines.items():
        suite = suites.get(claim.suite)
        found = None if suite is None else claim.judge(suite["records"])
        if suite is None or found is None:
            continue
        commit = suite["git"]["commit"][:9] + (" with changes" if suite["git"]["dirty"] else "")
        yield [name, found.measured, found.verdict, f"{folder}/{claim.suite}.json, {suite['date'][:10]}, {commit}"]


def _evidence(results: Path) -> Iterator[str]:
    """What the records without times say."""
    for statement in STATEMENTS:
        path = results / statement.record
        if not path.exists():
            continue
        if (found := statement.judge(json.loads(path.read_text(encoding="utf-8")))) is None:
            continue
        yield f"**{statement.text}** ({statement.source}) {statement.where}"
        yield table(["measured", "verdict", "record"], [[found.measured, found.verdict, statement.record]])
