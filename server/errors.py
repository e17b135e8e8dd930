"""One table from exceptions to HTTP status, OpenAI error type and headers, and the error body itself."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine import errors
from server.anthropic_errors import envelope, is_anthropic

MAX_MESSAGE_BYTES = 2048  # the whole error body stays under 4 KiB, whatever gets escaped
MAX_RETRY_AFTER_S = 30
LINGER_S = 2.0
LINGER_BYTES = 64 * 1024 * 1024

# the first class that matches decides
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.Conflict, 409, "conflict"),
    (errors.RequestError, 400, "invalid_request_error"),
    (errors.RateLimited, 429, "rate_limit_error"),
    (errors.QueueFull, 429, "rate_limit_error"),
    (errors.NotReady, 503, "unavailable_error"),
    (errors.CapacityError, 503, "server_overloaded"),
    (errors.DeadlineExceeded, 504, "timeout_error"),
    (errors.EngineDead, 503, "server_error"),
    (errors.Aborted, 503, "server_error"),
    (errors.EngineError, 500, "server_error"),
)
_STATUS_OF_CODE = dict.fromkeys(
    (
        *("model_not_found", "response_not_found", "previous_response_not_found", "item_not_found"),
        *("file_not_found", "files_not_found", "batch_not_found", "batches_not_found"),
    ),
    404,
)
_REASON_OF_CODE = {
    "invalid_api_key": "auth",
    "rate_limit_exceeded": "rate_limit",
    "queue_full": "queue_full",
    "queue_tokens_full": "queue_tokens",
    "sleeping": "sleeping",
    "draining": "draining",
    "loading": "loading",
    "context_length_exceeded": "context_length",
    "model_not_found": "model_not_found",
}


class ClientDisconnected(Exception):
    """The client left; nobody will read an answer."""


class ApiError(Exception):
    """An answer other than 2xx, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.close = close  # the body was not read to its end: the connection cannot be used again
        self.error = {"message": _cut(message), "type": type, "param": param, "code": code}

    @property
    def reason(self) -> str | None:
        """Label of the rejection metric; None when the fault is ours."""
        if self.status == 413:
            return "body_too_large"
        code = self.error["code"]
        if code in _REASON_OF_CODE:
            return _REASON_OF_CODE[code]
        return "validation" if self.status < 500 else None

    def body(self, path: str = "") -> dict[str, Any]:
        """In the form that clients of the route at `path` read; the OpenAI form is that of most."""
        return envelope(self.status, self.error) if is_anthropic(path) else {"error": self.error}

    def response(self, path: str = "") -> Response:
        content = msgspec.json.encode(self.body(path))
        kind = LingeringResponse if self.close else Response
        return kind(content, status_code=self.status, headers=self.headers, media_type="application/json")


# What routes raise on purpose. Anything else is a fault of ours, which the log must tell.
EXPECTED = (errors.KvasirError, ApiError, HTTPException, ClientDisconnected)


class LingeringResponse(Response):
    """Answers before the request body was read, then swallows some of it.

    Closing at once would reset the connection, and a client that is still sending would never see the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                swallowed = 0
                while swallowed < LINGER_BYTES:
                    message = await receive()
                    swallowed += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            # the sender had its chance to notice the answer
            swallowed = LINGER_BYTES
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def to_api_error(error: Exception, request_id: str = "") -> ApiError:
    """The answer to an exception. Anything that is not ours becomes a fixed text with the request id."""
    for kind, status, error_type in _TABLE:
        if isinstance(error, kind):
            code = getattr(error, "code", None)
            headers = {}
            if isinstance(error, errors.CapacityError):
                headers["Retry-After"] = str(min(max(int(error.retry_after_s), 1), MAX_RETRY_AFTER_S))
            elif isinstance(error, errors.EngineDead):
                headers["Retry-After"] = "5"
            elif status >= 500 or status == 409:
                headers["x-should-retry"] = "false"  # the same request would fail again, or cost as much again
            return ApiError(
                _STATUS_OF_CODE.get(str(code), status),
                str(error),
                type=error_type,
                code=code,
                param=getattr(error, "param", None),
                headers=headers,
            )
    if isinstance(error, ApiError):
        return error
    message = f"internal error; the server's log has the details under request id {request_id}"
    return ApiError(500, message, type="server_error", code="internal_error", headers={"x-should-retry": "false"})


def _cut(message: str) -> str:
    """At most MAX_MESSAGE_BYTES, without the control characters that JSON would blow up sixfold."""
    data = "".join(char if char >= " " else " " for char in message[:MAX_MESSAGE_BYTES]).encode("utf-8", "replace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return data.decode()
    return data[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."
