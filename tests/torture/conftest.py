"""What the tests have noted down with ``record_property("torture", (what, how many, what came of it))``, as a table."""

from __future__ import annotations

import pytest

from tests.torture.amounts import FULL, SEED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not FULL:
        return
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [row for report in reports for name, row in report.user_properties if name == "torture"]
    terminalreporter.section(f"torture, seed {SEED}")
    for what, count, found in rows:
        terminalreporter.write_line(f"{what:<44} {count:>6}  {found}")
