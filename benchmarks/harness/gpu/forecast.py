"""What was forecast for an H100 before anything had run on one, row by row; a measurement hits or misses it.

Microseconds per call; a range is (low, high). Forecasts are arithmetic from bytes at 3.0 TB/s, 798 TFLOP/s and
published launch costs, so a result better than the range says "look at the baseline first".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Range = tuple[float, float]
COMPILE, COMPILE_MAX = "compile", "compile-max"  # peers, see `benchmarks.peers.link_gpu`
DEVICE = "H100"  # part of the name of devices that the numbers are for


@dataclass(frozen=True)
class Forecast:
    """One row.

    Attributes:
        row: its name.
        floor_us: least time by arithmetic.
        ours_us: our time.
        peers_us: the peers' times, by implementation.
        claims: speed-ups over peers that we may then claim.
    """

    row: str
    floor_us: float
    ours_us: Range
    peers_us: Mapping[str, Range] = field(default_factory=dict)
    claims: Mapping[str, Range] = field(default_factory=dict)


def misses(forecast: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Every number of ``forecast`` (a `Forecast` as a dictionary) that ``record`` fails to reach, in words."""
    found = []
    ours = record["impls"]["fused"]["t_us"]["p50"]
    if ours > forecast["ours_us"][1]:
        found.append(f"{ours:.1f} us, forecast at most {forecast['ours_us'][1]:g}")
    for peer, (low, _) in forecast["claims"].items():
        ratio = record["ratios"].get(peer)
        if ratio is not None and ratio["value"] < low:
            found.append(f"{ratio['value']:.2f}x {peer}, forecast at least {low:g}x")
    return found


def surprises(forecast: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Every speed-up beyond its range: the baseline is to be suspected first."""
    found = []
    for peer, (_, high) in forecast["claims"].items():
        ratio = record["ratios"].get(peer)
        if ratio is not None and ratio["value"] > high:
            found.append(f"{ratio['value']:.2f}x {peer}, forecast at most {high:g}x")
    return found


def verdict(record: Mapping[str, Any]) -> str:
    """ "hit", "miss: ..." or "beyond: ..."; a dash for a record without a forecast."""
    forecast = record.get("forecast")
    if forecast is None:
        return "–"
    if missed := misses(forecast, record):
        return "**miss**: " + "; ".join(missed)
    if beyond := surprises(forecast, record):
        return "hit; beyond it, check the baseline: " + "; ".join(beyond)
    return "hit"


ROWS = {
    row.row: row
    for row in (
        Forecast(
            "inner T=1, cold",
            5.6,
            (8.5, 10),
            {"eager": (16, 20), COMPILE: (15, 19), COMPILE_MAX: (10, 13)},
            {"eager": (1.7, 2.2), COMPILE_MAX: (1.1, 1.4)},
        ),
        Forecast(
            "inner T=1, warm",
            3.1,
            (5.5, 7),
            {"eager": (12, 15), COMPILE: (11, 14), COMPILE_MAX: (7, 9)},
            {"eager": (1.9, 2.3), COMPILE_MAX: (1.2, 1.4)},
        ),
        Forecast(
            "inner T=32, cold",
            5.7,
            (9, 11),
            {"eager": (16, 20), COMPILE: (15, 19), COMPILE_MAX: (11, 14)},
            {"eager": (1.5, 2), COMPILE_MAX: (1.1, 1.3)},
        ),
        Forecast(
            "inner T=4096",
            86,
            (100, 104),
            {"eager": (121, 121), COMPILE: (112, 112)},
            {"eager": (1.15, 1.25), COMPILE: (1.03, 1.1)},
        ),
        Forecast(
            "inner T=4096, norms",
            86,
            (114, 118),
            {"eager": (137, 137), COMPILE: (128, 128)},
            {"eager": (1.15, 1.25), COMPILE: (1.03, 1.1)},
        ),
        Forecast(
            "outer T=1536 forward",
            33,
            (43, 48),
            {"eager": (58, 64), COMPILE: (54, 60)},
            {"eager": (1.25, 1.4), COMPILE: (1.15, 1.3)},
        ),
        Forecast(
            "outer T=1536 backward",
            67,
            (85, 95),
            {"eager": (115, 130), COMPILE: (105, 120)},
            {"eager": (1.3, 1.4), COMPILE: (1.2, 1.3)},
        ),
        Forecast(
            "outer T=16384 forward",
            355,
            (405, 420),
            {"eager": (470, 490), COMPILE: (445, 460)},
            {"eager": (1.15, 1.25), COMPILE: (1.08, 1.12)},
        ),
        Forecast(
            "outer T=16384 backward",
            710,
            (810, 840),
            {"eager": (940, 970), COMPILE: (890, 920)},
            {"eager": (1.15, 1.25), COMPILE: (1.08, 1.1)},
        ),
        Forecast(
            "inner hidden 128, T=16384",
            45,
            (55, 70),
            {"eager": (115, 125), COMPILE: (95, 110)},
            {"eager": (1.8, 2.2), COMPILE: (1.5, 1.8)},
        ),
        Forecast(
            "inner hidden 256, T=16384",
            45,
            (55, 70),
            {"eager": (115, 125), COMPILE: (95, 110)},
            {"eager": (1.8, 2.2), COMPILE: (1.5, 1.8)},
        ),
        Forecast(
            "cosine T=16384",
            67,
            (70, 78),
            {"eager": (1400, 1600), COMPILE: (110, 135)},
            {"eager": (18, 25), COMPILE: (1.4, 1.8)},
        ),
        Forecast(
            "four agents, inner T=32",
            22.4,
            (26, 29),
            {"eager": (65, 80), COMPILE: (44, 56)},
        ),
        Forecast(
            "handoff B=32 m=48",
            55,
            (70, 78),
            {"eager": (90, 105)},
            {"eager": (1.3, 1.5)},
        ),
        Forecast(
            "handoff B=32 m=48, as released",
            55,
            (70, 120),
            {"as released": (2000, 3000)},
            {"as released": (20, 40)},
        ),
    )
}
