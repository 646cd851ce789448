"""An answer on its way to whoever asked, in one piece or as it is written; a row whose client has left is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from recmas.answering.answers import Answer
from recmas.scheduling.row import VisitDone
from recmas.serving.errors import ApiError
from recmas.serving.protocol import ChatRequest, Reply, event, usage
from recmas.serving.service import Asked, Service

SILENCE = 15.0
"""Seconds after which a stream without news says that it is still there."""


async def whole(service: Service, asked: Asked, wanted: ChatRequest, reply: Reply, request: Request) -> Any:
    """The answer in one piece; nobody computes it any more when the client has left."""

    async def collect() -> dict[str, Any]:
        visits: list[VisitDone] = []
        async for item in asked.news():
            if isinstance(item, VisitDone):
                visits.append(item)
            elif isinstance(item, Answer):
                shown = [asdict(visit) for visit in visits] if wanted.trace else None
                return reply.whole(item, _finish(visits), usage(item, asked.positions), shown)
        raise AssertionError("an answer ends the news")

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not answer.done():
            service.drop(asked)
        return await answer
    finally:
        gone.cancel()
        service.drop(asked)  # where this request was cancelled


class Stream(StreamingResponse):
    """An answer as it is written; nobody computes it any more when the client has left, whether it had begun or not."""

    def __init__(self, service: Service, asked: Asked, wanted: ChatRequest, reply: Reply) -> None:
        pieces = _stream(asked, wanted, reply)
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._service, self._asked = service, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.drop(self._asked)


async def _stream(asked: Asked, wanted: ChatRequest, reply: Reply) -> AsyncIterator[bytes]:
    """The answer as it is written, with the visits where a trace is wanted."""
    visits: list[VisitDone] = []
    news = aiter(asked.news())
    coming = asyncio.ensure_future(anext(news))
    try:
        yield reply.chunk({"role": "assistant", "content": ""})
        while True:
            done, _ = await asyncio.wait({coming}, timeout=SILENCE)
            if not done:
                yield b": still at work\n\n"
                continue
            item = coming.result()
            if isinstance(item, str):
                yield reply.chunk({"content": item})
            elif isinstance(item, VisitDone):
                visits.append(item)
                if wanted.trace:
                    yield reply.beside(recmas={"visit": asdict(item)})
            elif isinstance(item, Answer):
                yield reply.chunk({}, _finish(visits))
                if wanted.stream_options is not None and wanted.stream_options.include_usage:
                    yield reply.beside(usage=usage(item, asked.positions))
                break
            coming = asyncio.ensure_future(anext(news))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


def _finish(visits: list[VisitDone]) -> str:
    """Why the text ends: by itself, or at its bound."""
    return "stop" if visits[-1].complete else "length"
