"""Options and fixtures of the benchmarks; see README.md here for how to run and read them."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.bench import Bench
from benchmarks.harness.machine import Device, Limits, git_commit, versions
from benchmarks.harness.record import SCHEMA
from benchmarks.report.comparison import Comparison
from benchmarks.report.stored import RESULTS

_MACHINE = pytest.StashKey[tuple[Device, Limits]]()
_COMPARISON = pytest.StashKey[Comparison]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=("quick", "full"),
        help="quick, the default: small shapes, nothing claimed; full: the measured grid, in which a missed goal fails",
    )
    parser.addoption(
        "--compare",
        action="store_true",
        help="measure the full grid, and fail where a claimed ratio is more than 15% worse than in the record of this "
        "machine type",
    )
    parser.addoption("--step", metavar="NAME", help="of the GPU suites, this step's cells only (benchmarks.gpu.cells)")
    parser.addoption("--records", metavar="FILE", help="where the GPU suites write their results, after every cell")
    parser.addoption(
        "--seconds", type=float, help="wall time for the GPU suites: the most important cells run, the rest is left out"
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch finds again what it compiled while it imitated another processor, and aborts when it runs that without.
    if (imitated := os.environ.get("ATEN_CPU_CAPABILITY")) is not None:
        own = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{imitated}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))
    config.stash[_MACHINE] = (Device(), Limits())
    compare = config.getoption("compare")
    if compare and config.getoption("grid") == "quick":
        raise pytest.UsageError("--compare: records hold the full grid, not the quick one")
    config.option.grid = config.getoption("grid") or ("full" if compare else "quick")
    if compare:
        try:
            config.stash[_COMPARISON] = Comparison.with_committed(RESULTS, Device().slug)
        except ValueError as error:
            raise pytest.UsageError(f"--compare: {error}") from error


def pytest_collection_finish(session: pytest.Session) -> None:
    """No time of the quick grid is claimed: it need not look, again and again, through all that was imported."""
    if session.config.option.grid == "quick":
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    comparison = session.config.stash.get(_COMPARISON, None)
    if comparison is not None and comparison.failed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (comparison := config.stash.get(_COMPARISON, None)) is not None:
        terminalreporter.section("ratios, then and now")
        for line in comparison.lines():
            terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``case`` runs once per cell of its module's ``cases(full)``."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("grid") == "full")
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Bench]:
    config = request.config
    device, limits = config.stash[_MACHINE]
    yield Bench(benchmark, device, limits, full=config.getoption("grid") == "full")
    comparison = config.stash.get(_COMPARISON, None)
    if comparison is not None and (record := benchmark.extra_info.get("record")) is not None:
        comparison.add(record)


@pytest.hookimpl(optionalhook=True)  # the GPU suites run without pytest-benchmark
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Say once per file where all its records come from."""
    device, limits = config.stash[_MACHINE]
    output_json["recmas"] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "grid": config.getoption("grid"),
        "git": git_commit(),
        "device": device.describe(),
        "versions": versions(),
        "limits": limits.measured(),
    }
