"""The application: routes, and the checks that stand before them."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recmas.serving.delivery import Stream, whole
from recmas.serving.errors import ApiError
from recmas.serving.keys import ApiKeys
from recmas.serving.protocol import ChatRequest, Reply, read_request
from recmas.serving.service import Service
from recmas_kernels import __version__

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
    503: {"description": "the server is being shut down, or an agent is gone for good"},
    504: {"description": "there was no answer in time"},
}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_CHAT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    },
    "security": [{}, {"key": []}],
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def make_app(service: Service, keys: ApiKeys | None = None) -> FastAPI:
    """The application that serves a system.

    Args:
        service: answers.
        keys: that are let in; None lets everybody in who reaches it.
    """

    async def check_host(request: Request) -> None:
        """A page of another site may not make its own name lead here."""
        named = request.headers.get("host", "")
        hosts = _LOOPBACK | {service.settings.host.lower()}
        if keys is None and service.settings.loopback and _host(named) not in hosts:
            raise ApiError(400, f"host: this server does not answer for {named!r}", "wrong_host")

    app = FastAPI(
        title="recmas", version=__version__, docs_url=None, redoc_url=None, dependencies=[Depends(check_host)]
    )
    _describe(app)
    _answer_errors(app)

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

    @app.get("/ready", responses={503: {"description": "an agent is gone, or the server is being shut down"}})
    async def ready() -> JSONResponse:
        """Requests are taken, and every agent is there to answer them."""
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

    @app.get(
        "/v1/models/{name:path}",
        responses={401: _ERRORS[401], 404: _ERRORS[404]},
        openapi_extra={"security": [{}, {"key": []}]},
    )
    async def model(name: str, request: Request) -> dict[str, Any]:
        """The system, if this is its name."""
        check_key(request)
        service.check_name(name)
        return service.described()

    @app.post("/v1/chat/completions", responses=_ERRORS, openapi_extra=_CHAT)
    async def chat(request: Request) -> Response:
        """Answer the last message of a chat."""
        try:
            check_key(request)
            service.check()
            asked_for = read_request(await _body(request, service.settings.max_body))
            asked = await service.ask(asked_for)
        except ApiError:
            service.metrics.requests.labels("refused").inc()
            raise
        except Exception:
            service.metrics.requests.labels("failed").inc()
            raise
        reply = Reply(asked.name, service.name)
        if asked_for.stream:
            return Stream(service, asked, asked_for, reply)
        return JSONResponse(await whole(service, asked, asked_for, reply, request))

    return app


def _host(named: str) -> str | None:
    """The host of a Host header, without its port and without the brackets of IPv6; None where it has none."""
    try:
        return urlsplit(f"//{named}").hostname
    except ValueError:
        return None


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


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(said.body, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def mistaken(request: Request, error: Exception) -> JSONResponse:
        """A mistake of this server, which the web server logs."""
        said = ApiError(500, "this request failed; the server's log says why", "failed")
        return JSONResponse(said.body, said.status)


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
