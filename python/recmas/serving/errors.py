"""Errors as the OpenAI interface writes them."""

from __future__ import annotations

from typing import Any


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


def of_failure(error: Exception) -> ApiError:
    """What a row's failure is to whoever asked."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, message, "timeout")
    if isinstance(error, ValueError):
        return ApiError(400, message, "invalid_value")
    return ApiError(500, message, "failed")
