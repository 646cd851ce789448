"""Requests drawn from the server's own OpenAPI description: whatever comes, nothing ends in a 5xx."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from recmas import DISTILLATION
from tests.runtime.scheduling.rows import tiny_system
from tests.runtime.serving.served import Served, served
from tests.torture.amounts import amount

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(tiny_system(DISTILLATION, rounds=1, steps=1), window=0.0, max_rounds=2, max_latent_steps=2) as found:
        yield found


def test_nothing_ends_in_a_5xx(server: Served) -> None:
    """Half of the bodies that could be answered are made to be: the model is named right."""
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    schema = schemathesis.openapi.from_url(f"{server.at}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for mode in modes if operation.body else modes[:1]:

            @settings(max_examples=amount(500), deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                if isinstance(case.body, dict) and len(str(case.body)) % 2:
                    case.body["model"] = "tiny"
                response = case.call()
                statuses[case.path, response.status_code] += 1
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert response.json()["error"]["message"]

            ask()
    path = "/v1/chat/completions"
    assert statuses[path, 200]
    assert statuses[path, 400]
    assert statuses[path, 404]
    assert {path for path, _ in statuses} == {path, "/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"}
