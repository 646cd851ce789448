"""Options and fixtures of the benchmarks; see README.md here for how to run and read them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from benchmarks.harness.bench import Bench
from benchmarks.harness.machine import Device, Limits, git_commit, versions
from benchmarks.harness.record import SCHEMA

_MACHINE = pytest.StashKey[tuple[Device, Limits]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=("quick", "full"),
        default="quick",
        help="quick: small shapes, nothing claimed; full: the measured grid, in which a missed goal fails",
    )

    parser.addoption("--step", metavar="NAME", help="of the GPU suites, this step's cells only (benchmarks.gpu.cells)")
    parser.addoption("--records", metavar="FILE", help="where the GPU suites write their results, after every cell")
    parser.addoption(
        "--seconds", type=float, help="wall time for the GPU suites: the most important cells run, the rest is left out"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MACHINE] = (Device(), Limits())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``case`` runs once per cell of its module's ``cases(full)``."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("grid") == "full")
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Bench:
    device, limits = request.config.stash[_MACHINE]
    return Bench(benchmark, device, limits, full=request.config.getoption("grid") == "full")


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
