"""A tiny system behind a server in this process, and the official client."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import uvicorn

from recmas import RecursiveMAS
from recmas.scheduling.executor import Executor, LocalExecutor
from recmas.serving.app import make_app
from recmas.serving.keys import ApiKeys
from recmas.serving.server import Server, address, service_of, url
from recmas.serving.service import Service
from recmas.serving.settings import ServeSettings


class Served:
    """A server under way."""

    def __init__(self, at: str, service: Service, server: Server) -> None:
        self.at, self.service, self._server = at, service, server

    def stop(self, drain: float) -> None:
        """As SIGTERM does, with so many seconds to drain."""
        self._server.drain = drain
        self._server.should_exit = True

    def client(self, key: str = "no key", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.at}/v1", api_key=key, **{"max_retries": 0, "timeout": 300, **options})

    def get(self, path: str) -> int:
        """The status of a page."""
        connection = http.client.HTTPConnection(self.at.removeprefix("http://"), timeout=300)
        connection.request("GET", path)
        return connection.getresponse().status

    def counted(self, name: str, **labels: str) -> float:
        """A number of /metrics."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def served(
    system: RecursiveMAS, executor: Executor | None = None, keys: Path | None = None, **settings: Any
) -> Iterator[Served]:
    asked = ServeSettings(port=0, **settings)
    with address(asked) as taken:
        service, dispatcher = service_of("tiny", system.outline, executor or LocalExecutor(system), asked)
        app = make_app(service, None if keys is None else ApiKeys(keys))
        server = Server(uvicorn.Config(app, log_level="error", lifespan="off"), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Served(url(taken), service, server)
        finally:
            server.should_exit = True
            thread.join()
            dispatcher.close()
