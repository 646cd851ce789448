"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from recmas.answering.answers import Answer

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class _Faults(Collector):
    """What an executor counts by itself, as counters."""

    def __init__(self, faults: Callable[[], Mapping[str, int]]) -> None:
        self._faults = faults

    def collect(self) -> Iterator[CounterMetricFamily]:
        for words, count in self._faults().items():
            yield CounterMetricFamily(f"recmas_{words.replace(' ', '_')}", words.capitalize(), value=count)


class Metrics:
    """Counters of one server.

    Args:
        faults: what the executor counts, by its name in words.
    """

    def __init__(self, faults: Callable[[], Mapping[str, int]] = dict) -> None:
        self.registry = registry = CollectorRegistry()
        rows = (1, 2, 4, 8, 16, 32, 64, 128)
        self.requests = Counter("recmas_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self.under_way = Gauge("recmas_requests_under_way", "Requests that wait or are answered", registry=registry)
        self.seconds = Histogram("recmas_request_seconds", "Of answered requests", buckets=_SECONDS, registry=registry)
        self._tokens = Counter("recmas_text_tokens", "Tokens written", ["role"], registry=registry)
        self._steps = Counter("recmas_latent_steps", "Latent steps", ["role"], registry=registry)
        self._rows = Histogram("recmas_batch_rows", "Rows of a batch", ["role"], buckets=rows, registry=registry)
        self._batches = Histogram("recmas_batch_seconds", "Of a batch", ["role"], buckets=_SECONDS, registry=registry)
        registry.register(_Faults(faults))

    def batch(self, role: str, rows: int, seconds: float) -> None:
        """A batch has ended."""
        self._rows.labels(role).observe(rows)
        self._batches.labels(role).observe(seconds)

    def answered(self, answer: Answer, seconds: float) -> None:
        """A request has been answered."""
        self.requests.labels("answered").inc()
        self.seconds.observe(seconds)
        for role, count in answer.text_tokens.items():
            self._tokens.labels(role).inc(count)
        for role, count in answer.latent_steps.items():
            self._steps.labels(role).inc(count)

    def summary(self) -> str:
        """How requests ended, as a line."""
        ends = ("answered", "refused", "failed", "late", "left", "drained")
        counts = [int(self.registry.get_sample_value("recmas_requests_total", {"outcome": end}) or 0) for end in ends]
        return ", ".join(f"{end} {count}" for end, count in zip(ends, counts, strict=True))

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
