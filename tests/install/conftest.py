from __future__ import annotations

from pathlib import Path

import pytest

from tests.install.environments import Environment, copy_sources, quick_compiler


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An empty environment of the test's own."""
    return Environment(tmp_path)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources that the test may build in and break."""
    return copy_sources(tmp_path / "sources")


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, str]:
    """The compiler for builds that are to succeed or to fail by themselves."""
    return quick_compiler(tmp_path)
