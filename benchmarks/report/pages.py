"""A CPU's page of results, and its part of the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import tables


def title(device: Mapping[str, Any]) -> str:
    """A CPU's name, which several models share, with the family and model that tell them apart."""
    found = re.search(r"-(\d+)-(\d+)(-as-\w+)?-\d+-threads$", device["slug"])
    which = f" (family {found[1]}, model {found[2]})" if found else ""
    if imitates(device):
        which += f" imitating {device['instruction_set']['used']}"
    return f"{device['name']}{which}, {device['threads']} threads"


def imitates(device: Mapping[str, Any]) -> bool:
    """Whether a lower instruction set than the processor's was asked for: no record of that processor."""
    return "-as-" in str(device["slug"])


def page(suites: dict[str, dict[str, Any]]) -> str:
    """A device's page: where the numbers come from, the goals, and every table."""
    device = next(iter(suites.values()))["device"]
    parts = [
        f"# {title(device)}",
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
    parts = [tables.full_table(records), "Every implementation, median:", tables.peer_table(records)]
    if left_out := tables.unmeasured_list(records):
        parts += ["Not measured:", left_out]
    return parts


def headline(machines: Mapping[str, dict[str, dict[str, Any]]]) -> str:
    """The README's part: a short table of the CPU that most is known of, and where everything else is."""
    own = {slug: suites for slug, suites in machines.items() if not imitates(_device(suites))} or machines
    chosen = max(own, key=lambda slug: len(own[slug]))
    suites = machines[chosen]
    device, records = _device(suites), {name: suite["records"] for name, suite in suites.items()}
    goals = tables.goals(record for members in records.values() for record in members).splitlines()[0]
    torch = next(iter(suites.values()))["versions"]["torch"]
    links = [f"[{slug}](benchmarks/results/{slug}/README.md)" for slug in machines]
    return "\n\n".join(
        [
            f"{title(device)}, {device['instruction_set']['used']}, torch {torch}:",
            tables.headline(records),
            f"{goals} All cells, columns, plots and misses, here and elsewhere: {', '.join(links)}. "
            "Every claim with its verdict: [docs/results.md](docs/results.md).",
        ]
    )


def _device(suites: Mapping[str, dict[str, Any]]) -> Mapping[str, Any]:
    device: Mapping[str, Any] = next(iter(suites.values()))["device"]
    return device
