"""Runs an application until a signal ends it: the address is taken before anything is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from recmas.config.outline import Outline
from recmas.scheduling.dispatcher import Dispatcher, Limits
from recmas.scheduling.executor import Executor
from recmas.serving.app import make_app
from recmas.serving.keys import ApiKeys
from recmas.serving.metrics import Metrics
from recmas.serving.service import Service
from recmas.serving.settings import ServeSettings

LAST_WORDS = 5
"""Seconds in which whoever still waits when draining ends is told so."""


@contextlib.contextmanager
def address(settings: ServeSettings) -> Iterator[socket.socket]:
    """The address of a server, taken; whoever connects waits until the server runs.

    Raises:
        ValueError: it is in use, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((settings.host, settings.port))
            taken.listen(2048)  # two may bind an address that nobody listens on
        except OSError as error:
            raise ValueError(f"{settings.host}:{settings.port}: {error.strerror or error}") from None
        yield taken


def url(taken: socket.socket) -> str:
    """How a browser on this machine reaches the address."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def service_of(name: str, outline: Outline, executor: Executor, settings: ServeSettings) -> tuple[Service, Dispatcher]:
    """A service over an executor, and the dispatcher that is to be closed when it ends."""
    metrics = Metrics(lambda: executor.faults)
    limits = Limits(settings.window / 1000, settings.batch_rows, settings.batch_tokens)
    dispatcher = Dispatcher(
        executor, limits, on_batch=lambda work, rows, seconds: metrics.batch(work.role, rows, seconds)
    )
    return Service(name, outline, dispatcher, settings, metrics), dispatcher


def serve(name: str, outline: Outline, executor: Executor, settings: ServeSettings, taken: socket.socket) -> None:
    """Serve until a signal comes; requests that are under way then end first, within `settings.drain` seconds."""
    service, dispatcher = service_of(name, outline, executor, settings)
    keys = None if settings.api_keys is None else ApiKeys(Path(settings.api_keys))
    app = make_app(service, keys)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(settings.drain) + LAST_WORDS,
        http="h11",
        h11_max_incomplete_event_size=1 << 16,
    )
    try:
        Server(config, service).run(sockets=[taken])
    finally:
        dispatcher.close()
        print(f"{name}: {service.metrics.summary()}", file=sys.stderr, flush=True)


class Server(uvicorn.Server):
    """Stops taking requests in before it stops listening; those that do not end in `drain` seconds are told so."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self.drain = service, service.settings.drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        end = asyncio.get_running_loop().call_later(self.drain, self._service.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()
