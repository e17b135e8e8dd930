"""The outermost ASGI layer: request ids, header limits, security headers, HTTP metrics, and the last resort for errors.

Pure ASGI: it hides neither disconnects nor partial bodies from the routes.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.config import Limits
from engine.metrics import OTHER, Metrics
from server.anthropic_errors import is_anthropic
from server.auth import route_path
from server.errors import ApiError, ClientDisconnected, to_api_error

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]+")
SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"),)
NO_STORE = (b"cache-control", b"no-store")
CLIENT_CLOSED_REQUEST = 499


class RouteLabels:
    """Paths -> route templates, so that no label of a metric is ever chosen by a client."""

    def __init__(self, templates: Iterable[str]) -> None:
        templates = list(templates)
        self._exact = {template for template in templates if "{" not in template}
        patterns = [(_prefix(template), _suffix(template), template) for template in templates if "{" in template]
        self._patterns = sorted(patterns, key=lambda pattern: len(pattern[1]), reverse=True)

    def of(self, path: str) -> str:
        if path in self._exact:
            return path
        return next(
            (template for head, tail, template in self._patterns if path.startswith(head) and path.endswith(tail)),
            OTHER,
        )


def _prefix(template: str) -> str:
    return template.partition("{")[0]


def _suffix(template: str) -> str:
    return template.rpartition("}")[2]


class Observe:
    """Wraps everything else. The guard behind it decides; this one only looks."""

    def __init__(self, app: ASGIApp, metrics: Metrics, labels: RouteLabels, limits: Limits) -> None:
        self._app = app
        self._metrics = metrics
        self._labels = labels
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _complete(message.get("headers", ()), request_id)}
                if is_anthropic(route_path(scope)):
                    message["headers"].append((b"request-id", request_id.encode("ascii")))
            await send(message)

        route = self._labels.of(route_path(scope))
        began_at = time.monotonic()
        self._metrics.http.began(route)
        try:
            refusal = self._check_head(scope)
            if refusal is None:
                await self._app(scope, receive, send_with_headers)
            else:
                self._metrics.http.rejected("other")
                await refusal.response(route_path(scope))(scope, receive, send_with_headers)
        except ClientDisconnected:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if not status:
                await to_api_error(error, request_id).response(route_path(scope))(scope, receive, send_with_headers)
        finally:
            if scope["state"].get("is_disconnected"):
                status = CLIENT_CLOSED_REQUEST
            self._metrics.http.ended(route, scope["method"], status or 500, time.monotonic() - began_at)

    def _check_head(self, scope: Scope) -> ApiError | None:
        limits = self._limits
        if len(scope["headers"]) > limits.max_header_fields:
            message = f"the request has more than {limits.max_header_fields} header fields"
            return ApiError(431, message, code="too_many_headers", close=True)
        url_bytes = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
        if url_bytes > limits.max_url_bytes:
            message = f"the path and query are longer than {limits.max_url_bytes} bytes"
            return ApiError(400, message, code="url_too_long", close=True)
        return None

    def _request_id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                if len(value) <= self._limits.max_label_chars and REQUEST_ID.fullmatch(value):
                    return str(value.decode("ascii"))
                break
        return secrets.token_hex(16)


def _complete(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    headers = [*headers, (b"x-request-id", request_id.encode("ascii")), *SECURITY_HEADERS]
    if not any(name == b"cache-control" for name, _ in headers):
        headers.append(NO_STORE)
    return headers
