"""Records as plots: time against tokens with the floor and every peer, and the handoff over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.harness.names import EAGER_FLOAT32, FUSED, PRODUCTS, ZENTORCH
from benchmarks.report.tables import HEADLINE_SHAPE, Record, headline_records

STYLES: dict[str, dict[str, Any]] = {
    FUSED: {"color": "#d1495b", "marker": "o", "linewidth": 2.2, "zorder": 5},
    "eager": {"color": "#30638e", "marker": "s"},
    "addmm": {"color": "#00798c", "marker": "^"},
    "compile": {"color": "#8a6fb0", "marker": "v"},
    "compile-frozen": {"color": "#edae49", "marker": "D"},
    ZENTORCH: {"color": "#c06c84", "marker": "P"},
    EAGER_FLOAT32: {"color": "#30638e", "marker": "s", "linestyle": "--"},
    PRODUCTS: {"color": "#777777", "linestyle": "--"},
}
LABELS = {PRODUCTS: "library products alone"}


def link_plot(records: Sequence[Record], path: Path, device: str) -> None:
    """Time of one forward of the released inner link against tokens, a panel per dtype."""
    chosen = headline_records(records)
    dtypes = list(dict.fromkeys(record["dtype"] for record in chosen))
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 4.4), sharey=True, squeeze=False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        cells = sorted((record for record in chosen if record["dtype"] == dtype), key=lambda record: record["tokens"])
        for name, style in STYLES.items():
            points = [(cell["tokens"], cell["impls"][name]["t_us"]) for cell in cells if name in cell["impls"]]
            if not points:
                continue
            tokens, times = zip(*points, strict=True)
            medians = [time["p50"] / 1e3 for time in times]
            panel.plot(tokens, medians, label=LABELS.get(name, name), markersize=4, **style)
            if name in (FUSED, "eager"):
                low, high = ([time[key] / 1e3 for time in times] for key in ("p20", "p80"))
                panel.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
        floor = [cell["floor_us"] / 1e3 for cell in cells]
        panel.plot(
            [cell["tokens"] for cell in cells], floor, color="black", linestyle=":", label="floor (measured rates)"
        )
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"inner link {HEADLINE_SHAPE}, {dtype}")
        panel.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([cell["tokens"] for cell in cells]))
        panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.grid(which="both", alpha=0.25)
    panels[0][0].set_ylabel("ms per forward (median; band: p20 to p80)")
    panels[0][-1].legend(fontsize=8)
    _save(figure, path, device)


def handoff_plot(records: Sequence[Record], path: Path, device: str) -> None:
    """Time of a text and of a latent handoff against the size of the vocabulary."""
    cells = sorted(records, key=lambda record: record["vocabulary"])
    figure, panel = pyplot.subplots(figsize=(5.6, 4.2))
    sizes = [cell["vocabulary"] for cell in cells]
    for name, label, color in (("text", "text: head, argmax, embed", "#30638e"), (FUSED, "latent: links", "#d1495b")):
        measured = [cell for cell in cells if name in cell["impls"]]
        times = [cell["impls"][name]["t_us"]["p50"] / 1e3 for cell in measured]
        panel.plot([cell["vocabulary"] for cell in measured], times, "o-", label=label, color=color)
    panel.set(
        xscale="log", yscale="log", xlabel="|V|", ylabel="ms per handoff", title=cells[0]["shape"].split(", |V|")[0]
    )
    panel.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(sizes))
    panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda size, _: f"{size / 1000:g}k"))
    panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    panel.grid(which="both", alpha=0.25)
    panel.legend(fontsize=8)
    _save(figure, path, device)


def _save(figure: pyplot.Figure, path: Path, device: str) -> None:
    figure.suptitle(device, fontsize=9)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):  # same records, same file
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
