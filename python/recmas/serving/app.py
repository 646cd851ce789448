"""The application: routes, and the checks that stand before them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from recmas.answering.answers import Answer
from recmas.scheduling.row import VisitDone
from recmas.serving.errors import ApiError
from recmas.serving.keys import ApiKeys
from recmas.serving.protocol import ChatRequest, Reply, event, read_request, usage
from recmas.serving.service import Asked, Service
from recmas_kernels import __version__

SILENCE = 15.0
"""Seconds after which a stream without news says that it is still there."""
PATIENCE = 30.0
"""Seconds that a client has to send its request."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong, or asks for more than this server gives"},
    401: {"description": "no key, or a wrong one"},
    404: {"description": "another model"},
    408: {"description": "the request did not arrive in time"},
    413: {"description": "the request is too large"},
    415: {"description": "the request is not application/json"},
    429: {"description": "as many requests as this server takes are under way; Retry-After says when to come again"},
    500: {"description": "an agent failed"},
    503: {"description": "the server is being shut down"},
    504: {"description": "there was no answer in time"},
}
_CHAT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    },
    "security": [{}, {"key": []}],
}
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def make_app(service: Service, keys: ApiKeys | None = None) -> FastAPI:
    """The application that serves a system.

    Args:
        service: answers.
        keys: that are let in; None lets everybody in who reaches it.
    """
    app = FastAPI(title="recmas", version=__version__, docs_url=None, redoc_url=None)
    _describe(app)
    _answer_errors(app)
    if keys is None and service.settings.loopback:  # a page of another site may not make its name lead here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])

    def check_key(request: Request) -> None:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if keys is not None and not (kind.lower() == "bearer" and keys.accept(key.strip())):
            raise ApiError(401, "no API key that this server knows", "invalid_api_key")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = (files("recmas.serving") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "not ready, or being shut down"}})
    async def ready() -> JSONResponse:
        """Requests are taken."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """What was counted, for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses={401: _ERRORS[401]}, openapi_extra={"security": [{}, {"key": []}]})
    async def models(request: Request) -> dict[str, Any]:
        """The one system that is served."""
        check_key(request)
        return {"object": "list", "data": [service.described()]}

    @app.post("/v1/chat/completions", responses=_ERRORS, openapi_extra=_CHAT)
    async def chat(request: Request) -> Response:
        """Answer the last message of a chat."""
        check_key(request)
        if not service.ready:
            raise ApiError(503, "the server is being shut down", "draining", headers={"Retry-After": "30"})
        asked_for = read_request(await _body(request, service.settings.max_body))
        asked = await service.ask(asked_for)
        reply = Reply(secrets.token_hex(12), service.name)
        if asked_for.stream:
            stream = _stream(service, asked, asked_for, reply)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(await _whole(service, asked, asked_for, reply, request))

    return app


async def _body(request: Request, most: int) -> bytes:
    """The body, as far as it is wanted."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "content-type: expected application/json", "not_json")

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request has more than {most} bytes", "too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), PATIENCE)
    except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
        raise ApiError(408, f"the request did not arrive in {PATIENCE:.0f} s", "too_slow") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request had arrived", "left") from None


async def _whole(service: Service, asked: Asked, wanted: ChatRequest, reply: Reply, request: Request) -> Any:
    """The answer in one piece; nobody computes it any more when the client has left."""

    async def collect() -> dict[str, Any]:
        visits: list[VisitDone] = []
        async for item in asked.news():
            if isinstance(item, VisitDone):
                visits.append(item)
            elif isinstance(item, Answer):
                shown = [asdict(visit) for visit in visits] if wanted.trace else None
                return reply.whole(item, _finish(asked, visits), usage(item, asked.positions), shown)
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


async def _stream(service: Service, asked: Asked, wanted: ChatRequest, reply: Reply) -> AsyncIterator[bytes]:
    """The answer as it is written, with the visits where a trace is wanted."""
    visits: list[VisitDone] = []
    news = aiter(asked.news())
    try:
        yield reply.chunk({"role": "assistant", "content": ""})
        coming = asyncio.ensure_future(anext(news))
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
                yield reply.chunk({}, _finish(asked, visits))
                if wanted.stream_options is not None and wanted.stream_options.include_usage:
                    yield reply.beside(usage=usage(item, asked.positions))
                break
            coming = asyncio.ensure_future(anext(news))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)
    finally:
        service.drop(asked)


def _finish(asked: Asked, visits: list[VisitDone]) -> str:
    """Why the text ends: by itself, or at its bound."""
    assert asked.row is not None
    bound = asked.row.manner.decoding[visits[-1].role].max_new_tokens
    return "length" if visits[-1].text_tokens >= bound else "stop"


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(said.body, error.status_code, headers=dict(error.headers or {}))


def _describe(app: FastAPI) -> None:
    """Add what routes that read their bodies themselves do not say about them."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()
        parts = schema.setdefault("components", {})
        model = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        parts.setdefault("schemas", {}).update(model.pop("$defs", {}) | {"ChatRequest": model})
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = described  # type: ignore[method-assign]
