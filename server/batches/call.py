"""One line of a batch through the routes of this very process: same checks and same JSON as over HTTP, no socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Scope

from server.batches.store import Usage

logger = logging.getLogger(__name__)


@dataclass
class Answer:
    """What a route answered."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_error(self) -> bool:
        return not 200 <= self.status < 300

    @property
    def error_code(self) -> str | None:
        """Of an error in OpenAI's form."""
        return _decoded(self.body, _Failure).error.code if self.is_error else None

    @property
    def retry_after_s(self) -> int:
        given = self.headers.get("retry-after", "")
        return int(given) if given.isdecimal() else 1

    @property
    def usage(self) -> Usage:
        """Zeros where there is none."""
        return Usage() if self.is_error else _decoded(self.body, _Success).usage.as_usage()


async def call(api: ASGIApp, url: str, body: Mapping[str, Any], *, tenant: str, request_id: str) -> Answer:
    """POSTs `body`. Cancelling it is the client's leaving: the work ends."""
    answer = Answer()
    sent = [{"type": "http.request", "body": msgspec.json.encode(body), "more_body": False}]

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError("nobody sets that event")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    try:
        await api(_scope(url, tenant, request_id), receive, send)
    except Exception:  # a fault of ours: it has been answered, and is only told here
        logger.exception("request %s failed", request_id)
    return answer


def record(answer: Answer, custom_id: str, request_id: str) -> bytes:
    """The line of the output or error file."""
    response = {"status_code": answer.status, "request_id": request_id, "body": msgspec.Raw(answer.body)}
    return msgspec.json.encode({"id": request_id, "custom_id": custom_id, "response": response, "error": None})


def _scope(url: str, tenant: str, request_id: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "state": {"tenant": tenant, "request_id": request_id},
    }


class _Error(msgspec.Struct):
    code: str | None = None


class _Failure(msgspec.Struct):
    error: _Error = msgspec.field(default_factory=_Error)


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _UsageFields(msgspec.Struct):
    """Those of all endpoints: each has one half of them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None

    def as_usage(self) -> Usage:
        read = self.prompt_tokens_details or self.input_tokens_details or _Details()
        written = self.completion_tokens_details or self.output_tokens_details or _Details()
        return Usage(
            input_tokens=self.prompt_tokens + self.input_tokens,
            cached_tokens=read.cached_tokens,
            output_tokens=self.completion_tokens + self.output_tokens,
            reasoning_tokens=written.reasoning_tokens,
        )


class _Success(msgspec.Struct):
    usage: _UsageFields = msgspec.field(default_factory=_UsageFields)


def _decoded(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError:
        return kind()
