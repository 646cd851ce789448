"""Agents of every family, built once."""

from __future__ import annotations

import pytest

from recmas.agents.agent import Agent
from tests.runtime.tiny import FAMILIES, tiny_agent


@pytest.fixture(scope="session", params=list(FAMILIES))
def agent(request: pytest.FixtureRequest) -> Agent:
    return tiny_agent(request.param, request.param)
