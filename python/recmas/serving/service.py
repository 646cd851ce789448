"""`Service`: requests into rows, and what becomes of a row back to whoever asked, across threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from recmas.answering.answers import Answer
from recmas.answering.manner import Manner
from recmas.config.outline import Outline
from recmas.prompts.template import Template
from recmas.scheduling.admission import check_room
from recmas.scheduling.dispatcher import Dispatcher
from recmas.scheduling.row import Row, VisitDone
from recmas.serving.errors import ApiError, Broken, Draining, of_failure, of_refusal
from recmas.serving.metrics import Metrics
from recmas.serving.protocol import ChatRequest
from recmas.serving.settings import ServeSettings

_LOG = logging.getLogger(__name__)

NEAREST = 3
"""Tokens shown for each latent where a trace is asked for."""

News = str | VisitDone | Answer | ApiError


class Asked:
    """A request under way: the sink of its row, and what its client reads."""

    def __init__(self, end: Callable[[Asked, str, Answer | None], None]) -> None:
        self.began = time.monotonic()
        self.positions = 0
        self.row: Row | None = None
        self.name = f"chatcmpl-{secrets.token_hex(12)}"
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News] = asyncio.Queue()

    async def news(self) -> AsyncIterator[News]:
        """Pieces of text and visits as they come, and at last the answer; a failure is raised.

        Raises:
            ApiError: there is no answer.
        """
        while True:
            item = await self._news.get()
            if isinstance(item, ApiError):
                raise item
            yield item
            if isinstance(item, Answer):
                return

    def text(self, piece: str) -> None:
        self._tell(piece)

    def visited(self, visit: VisitDone) -> None:
        self.positions += visit.positions
        self._tell(visit)

    def answered(self, answer: Answer) -> None:
        self._tell(answer, "answered")

    def failed(self, error: Exception) -> None:
        left, late = isinstance(error, ConnectionAbortedError), isinstance(error, TimeoutError)
        outcome = "left" if left else "late" if late else "drained" if isinstance(error, Draining) else "failed"
        self._tell(of_failure(error, self.name), outcome)

    def _tell(self, item: News, outcome: str | None = None) -> None:
        def take() -> None:
            self._news.put_nowait(item)
            if outcome is not None:
                self._end(self, outcome, item if isinstance(item, Answer) else None)

        with contextlib.suppress(RuntimeError):  # the server's loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(take)


class Service:
    """A system that answers requests.

    Args:
        name: of the system, as models are named.
        outline: of the system.
        dispatcher: takes rows through it.
        settings: what may be asked for.
        metrics: what is counted.
    """

    def __init__(
        self, name: str, outline: Outline, dispatcher: Dispatcher, settings: ServeSettings, metrics: Metrics
    ) -> None:
        self.name, self.outline, self.settings, self.metrics = name, outline, settings, metrics
        self.created = int(time.time())
        self.draining = False
        self._given_up = self._told = False
        texts = [text for one in outline.settings.values() for text in (one.prompt.first, one.prompt.later) if text]
        self._fields = sorted({name for text in texts for name in Template(text).fields} - {"question"})
        self._asked: set[Asked] = set()
        self._dispatcher = dispatcher
        self._numbers = itertools.count()
        self._under_way = 0
        self._pace = 0.1
        """Seconds between two answers, of late."""
        self._last_end = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now."""
        return not self.draining and self.broken is None and self._dispatcher.executor.ready

    @property
    def broken(self) -> Exception | None:
        """Why no request will be answered any more; None while that is not so."""
        return self._dispatcher.broken or self._dispatcher.executor.broken

    def check(self) -> None:
        """Raise why requests are not taken.

        Raises:
            ApiError: the server is being shut down, or an agent is gone for good.
        """
        if self.draining:
            raise Draining
        if self.broken is not None:
            if not self._told:
                _LOG.error("no request is answered any more", exc_info=self.broken)
                self._told = True
            raise Broken

    def check_name(self, model: str) -> None:
        """Raise ApiError where another model is asked for."""
        if model != self.name:
            raise ApiError(404, f"model: {model!r} is not here; this is {self.name!r}", "model_not_found", "model")

    async def ask(self, request: ChatRequest) -> Asked:
        """Take a request in.

        Raises:
            ApiError: it cannot be answered, or not now.
        """
        self.check_name(request.model)
        if self._under_way >= self.settings.queue:
            wait = math.ceil(min(60.0, max(1.0, self._pace * self._under_way)))
            text = f"{self._under_way} requests are under way, as many as this server takes; try again in {wait} s"
            raise ApiError(429, text, "queue_full", headers={"Retry-After": str(wait)})
        self._under_way += 1
        self.metrics.under_way.inc()
        asked = Asked(self._ended)
        try:
            asked.row = await self._row(request, asked)
        except BaseException:
            self._leave(None)
            raise
        if self._given_up:
            self._leave(None)
            raise Draining
        self._asked.add(asked)
        self._dispatcher.add(asked.row)
        return asked

    def give_up(self) -> None:
        """The time to drain is over: whoever still waits is told so."""
        self._given_up = True
        for asked in self._asked:
            assert asked.row is not None
            self._dispatcher.drop(asked.row, Draining())

    def drop(self, asked: Asked) -> None:
        """The client has left."""
        if asked.row is not None and not asked.row.over:
            self._dispatcher.drop(asked.row, ConnectionAbortedError("the client left"))

    def described(self) -> dict[str, Any]:
        """The system, as an entry of /v1/models."""
        pattern = self.outline.pattern
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "recmas",
            "recmas": {
                "stages": pattern.stages,
                "rounds": self.outline.defaults.rounds,
                "latent_steps": self.outline.steps_by_role(None),
                "fields": self._fields,
            },
        }

    async def _row(self, request: ChatRequest, asked: Asked) -> Row:
        settings = self.settings
        unknown = sorted(set(request.fields) - {*self._fields, "question", "messages"})
        if unknown:
            text = f"fields: this system reads no {unknown[0]!r}; besides the question it reads: {self._fields}"
            raise ApiError(400, text, "invalid_value", "fields")
        try:
            manner = Manner(self.outline, request.options(settings))
            fields = request.row()
            rooms = await asyncio.to_thread(self._dispatcher.executor.rooms, manner.rounds, fields)
            tokens = check_room(manner, rooms)
        except ValueError as error:
            raise of_refusal(error) from None
        if tokens > settings.max_prompt_tokens:
            text = (
                f"the longest visit takes {tokens} positions, more than the {settings.max_prompt_tokens} of this server"
            )
            raise ApiError(400, text, "context_length_exceeded", "messages")
        return Row(
            next(self._numbers),
            fields,
            manner,
            asked,
            stream=(request.seed, 0),
            tokens=tokens,
            nearest=NEAREST if request.trace else 0,
            deadline=asked.began + settings.timeout,
        )

    def _ended(self, asked: Asked, outcome: str, answer: Answer | None) -> None:
        self._asked.discard(asked)
        now = time.monotonic()
        self._pace += 0.1 * (min(now - self._last_end, 10.0) - self._pace)
        self._last_end = now
        if answer is not None:
            self.metrics.answered(answer, now - asked.began)
            self._leave(None)
        else:
            self._leave(outcome)

    def _leave(self, outcome: str | None) -> None:
        self._under_way -= 1
        self.metrics.under_way.dec()
        if outcome is not None:
            self.metrics.requests.labels(outcome).inc()
