"""Errors as the OpenAI interface writes them."""

from __future__ import annotations

import logging
import re
from typing import Any

from recmas.answering.answers import RowError

_LOG = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line that says what was wrong.
        code: for programs.
        param: the field that was wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 401:
            kind = "authentication_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Draining(ApiError):
    """The server is being shut down."""

    def __init__(self) -> None:
        super().__init__(503, "the server is being shut down", "draining", headers={"Retry-After": "30"})


class Broken(ApiError):
    """An agent is gone for good."""

    def __init__(self) -> None:
        super().__init__(503, "an agent of this server is gone; the server's log says why", "agent_gone")


def of_refusal(error: ValueError) -> ApiError:
    """What is wrong with a request, by whoever checked it as the one row of a run."""
    return ApiError(400, re.sub("^row 0[:,] ", "", " ".join(str(error).split())), "invalid_value")


def of_failure(error: Exception, name: str) -> ApiError:
    """What a row's failure is to whoever asked; what only the operator may read goes to the log, under `name`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error), "timeout")
    if isinstance(error, RowError):
        return of_refusal(error)
    if not isinstance(error, ConnectionAbortedError):
        _LOG.error("%s failed", name, exc_info=error)
    return ApiError(500, f"this request failed; the server's log says why, under {name}", "failed")
